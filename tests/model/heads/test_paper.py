import torch

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.model.build import build_model

PAPER = ("--preset", "paper", "--sampling.guidance", "1")


def test_an_untrained_paper_head_outputs_zero(tiny, seed):
    head = build_model(tiny(*PAPER), BitCodes(natural_codes(300), 9), eos=1).head
    context = head.condition(torch.randn(6, 4, 32))
    noisy = torch.randn(6, 4, 9)
    t = torch.rand(6, 4)
    (step,) = head.denoisers(context)(t.unsqueeze(0))
    assert not head.denoise(noisy, t, context).any()
    assert not step(noisy).any()


def test_state_i_modulates_token_i(tiny_model, seed):
    """Without attention, token i depends on state i alone (one-block shift, token-wise)."""
    head = tiny_model(*PAPER).head
    for block in head.blocks:
        torch.nn.init.zeros_(block.attention_out.weight)
    hidden = torch.randn(1, 4, 32, requires_grad=True)
    raw = head.denoise(torch.randn(1, 4, 9), torch.rand(1, 4), head.condition(hidden))
    (grad,) = torch.autograd.grad(raw[0, 2].square().sum(), hidden)

    assert [bool(grad[0, i].any()) for i in range(4)] == [False, False, True, False]
