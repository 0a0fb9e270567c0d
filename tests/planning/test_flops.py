import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.model.batch import Batch
from bitlm_dist.model.build import build_model
from bitlm_dist.planning.flops import generation_flops, training_flops

# one noise sample, several, one token per block, the paper (whose guidance doubles the passes), the
# baseline, and heads of the study with other parts
CASES = [
    (),
    ("--diffusion.num_noise_samples", "3"),
    ("--model.attention", "block", "--diffusion.next_token_loss_weight", "0"),
    ("--model.block_size", "1"),
    ("--preset", "paper"),
    ("--model.output", "softmax"),
    ("--model.input", "table"),
    ("--head.kind", "ablation", "--head.ablation", "no_lookahead"),
    (
        *("--head.kind", "ablation", "--head.ablation", "own_readout"),
        *("--diffusion.autoregressive_loss_weight", "0"),
    ),
]


@pytest.mark.parametrize("overrides", CASES, ids=" ".join)
def test_counts_are_those_that_torch_sees(overrides, tiny):
    config = tiny(*overrides, "--model.backbone.attention", "reference")
    model = build_model(config, BitCodes(natural_codes(300), 9), eos=1)
    length, m, b = 32, config.model.block_size, config.model.backbone
    tokens = torch.randint(2, 300, (4, length))
    batch = Batch(tokens, torch.zeros_like(tokens), torch.arange(4))
    with FlopCounterMode(display=False) as counter:
        model.loss(batch, seed=0, step=0)
    predicted = training_flops(config, 9, 300)
    targets = (length - m) / length  # all blocks but the first
    expected = (
        predicted.backbone + predicted.input + targets * (predicted.head + predicted.output)
    ) / 3
    # the reference kernel computes unseen scores too
    seen = m if config.model.attention == "block" else 1
    expected += b.num_layers * 4 * b.num_heads * b.head_dim * (length - (length + seen) / 2)

    # the sums over patterns of a mixture are small products, too
    mixture = config.model.output == "bits" and config.head.kind != "paper"
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(
        expected, rel=0.05 if mixture else 0.005
    )


def test_generation_counts_every_pass(tiny):
    denoiser = ["--head.kind", "ablation", "--head.ablation", "no_autoregressive_pass"]
    denoiser += ["--diffusion.autoregressive_loss_weight", "0"]
    sequential = tiny(*denoiser)
    ode = tiny(*denoiser, "--sampling.sampler", "ode", "--sampling.steps", "8")
    a, b = (
        generation_flops(sequential, 9, 300, mean_context_length=100),
        generation_flops(ode, 9, 300, mean_context_length=100),
    )
    assert a.backbone == b.backbone
    assert 1.5 < b.head / a.head < 2, "four passes beside eight; the context is read once"
    softmax = generation_flops(tiny("--model.output", "softmax"), 9, 300, mean_context_length=100)
    assert softmax.output == 2 * 32 * 300
    assert softmax.backbone == a.backbone
