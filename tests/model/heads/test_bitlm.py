import pytest
import torch

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.model.build import build_model, cast_weights
from bitlm_dist.model.in_block_decoding import AutoregressiveDecoder, DenoisingDecoder


def head_of(tiny, *overrides):
    config = tiny(*overrides)
    return build_model(config, BitCodes(natural_codes(300), 9), eos=1).head


def denoised(head, noisy, t, context):
    (step,) = head.denoisers(context)(t.unsqueeze(0))
    return step(noisy)


PAPER = ("--preset", "paper", "--sampling.guidance", "1")


def ablation(name, *overrides):
    return "--head.kind", "ablation", "--head.ablation", name, *overrides


NO_PASS = ("--diffusion.autoregressive_loss_weight", "0")
BARE = ablation(
    "bare",
    *("--diffusion.context_loss_weight", "0", "--diffusion.next_token_loss_weight", "0"),
    *NO_PASS,
    *("--head.bits_per_group", "1", "--head.num_mixture_components", "1"),
)


def test_an_untrained_head_returns_the_context_logits(tiny, seed):
    head = head_of(tiny)
    context = head.condition(torch.randn(6, 4, 32))
    torch.testing.assert_close(
        head.denoise(torch.randn(6, 4, 9), torch.rand(6, 4), context), context.context_logits
    )


def test_a_shared_readout_reads_state_and_correction_with_one_map(tiny_model, seed):
    """Compare with context_out(state + final(x)); the denoiser never forms that sum."""
    head = tiny_model().head
    hidden = torch.randn(6, 4, 32)
    x = torch.randn(6, 4, head.final.in_features)
    context = head.condition(hidden)
    ahead = torch.stack([hidden[:, -1] @ matrix.T for matrix in head.lookahead.weight], 1)
    states = hidden + ahead + head.positions
    raw = head.read_out(x, context.context_logits, context)

    torch.testing.assert_close(raw, head.context_out(states + head.final(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("overrides", [(), PAPER])
def test_denoisers_of_many_steps_compute_what_one_pass_does(overrides, tiny_model, seed):
    head = tiny_model(*overrides).head
    noisy = torch.randn(6, 4, 9)
    context = head.condition(torch.randn(6, 4, 32))
    times = torch.tensor([0.05, 0.5, 1.0])

    with torch.no_grad(), head.decoding():
        for t, step in zip(times, head.denoisers(context)(times[:, None, None]), strict=True):
            each = t.expand(6, 4)
            expected = head.output.denoise(
                head.denoise(noisy, each, context), head.output.channel_logits(noisy, each)
            )
            torch.testing.assert_close(step(noisy), expected, rtol=1e-4, atol=1e-4)


def test_weights_may_change_after_decoding(tiny_model, seed):
    head = tiny_model().head
    hidden = torch.randn(2, 4, 32)
    with torch.no_grad():
        with head.decoding():
            before = head.condition(hidden).readout[0].clone()
        head.context_out.weight.mul_(2)
        torch.testing.assert_close(head.condition(hidden).readout[0], 2 * before)


def test_an_untrained_skip_head_is_the_channel_posterior(tiny, seed):
    from bitlm_dist.diffusion.process import half_channel_logits

    head = head_of(tiny, *BARE)
    noisy = torch.randn(6, 4, 9)
    t = torch.rand(6, 4)
    out = denoised(head, noisy, t, head.condition(torch.randn(6, 4, 32)))
    torch.testing.assert_close(out, torch.tanh(half_channel_logits(noisy, t)))


@pytest.mark.parametrize("recipe", [(), PAPER])
def test_blocks_do_not_see_each_other_but_their_tokens_do(recipe, tiny_model, seed):
    head = tiny_model(*recipe).head
    noisy = torch.randn(3, 4, 9, requires_grad=True)
    t = torch.rand(3, 4)
    hidden = torch.randn(3, 4, 32)
    raw = head.denoise(noisy, t, head.condition(hidden))
    (grad,) = torch.autograd.grad(raw[1, 2].square().sum(), noisy)

    assert not grad[0].any()
    assert not grad[2].any()
    assert all(grad[1, i].any() for i in range(4))


NO_TABLES = ablation("no_group_tables")


def test_a_chain_sees_only_the_tokens_before(tiny_model, seed):
    head = tiny_model(*NO_TABLES).head
    clean = torch.randn(3, 4, 9).sign().requires_grad_()
    raw = head.autoregress(clean, head.condition(torch.randn(3, 4, 32)))

    for i in range(4):
        (grad,) = torch.autograd.grad(raw[1, i].square().sum(), clean, retain_graph=True)
        assert not grad[0].any()
        assert not grad[2].any()
        assert [bool(place.any()) for place in grad[1]] == [place < i for place in range(4)]


def test_tables_show_a_group_the_one_before_it_and_no_other(tiny_model, seed):
    """Flipping a bit of group j changes group j + 1 of its token, and later tokens."""
    head = tiny_model().head
    torch.nn.init.normal_(head.conditional_group_logits.rows)
    clean = torch.randn(1, 4, 9).sign()
    context = head.condition(torch.randn(1, 4, 32))

    def logits(bits):
        return head.autoregress(bits, context)[..., head.output.num_components :].view(
            4, head.output.num_components, 3, 8
        )

    for j in range(3):
        flipped = clean.clone()
        flipped[0, 1, 3 * j] *= -1
        changed = ((logits(flipped) - logits(clean)).abs() > 1e-3).any(-1).any(1)  # [token, group]
        assert changed[1].tolist() == [False, j == 0, j == 1]
        assert not changed[0].any()
        assert changed[2:].all()


def test_the_chain_law_sums_to_one_over_all_tokens(tiny_model, seed):
    """Sum over all 2^9 bit vectors of the first token of a block."""
    head = tiny_model().head
    torch.nn.init.normal_(head.conditional_group_logits.rows)
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 9).unsqueeze(1).expand(-1, 4, -1)
    context = head.condition(torch.randn(1, 4, 32).expand(512, -1, -1))
    log_prob = head.output.log_prob(head.autoregress(every, context), every)[:, 0]
    torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", ["1", "4"])
def test_chain_samples_follow_the_chain_law(block, tiny_model, seed):
    head = tiny_model("--model.block_size", block).head
    torch.nn.init.normal_(head.conditional_group_logits.rows)
    count = 100_000
    hidden = torch.randn(1, int(block), 32)
    context = head.condition(hidden.expand(count, -1, -1))
    bits = torch.zeros(count, int(block), 9)

    with torch.no_grad():
        drawn = AutoregressiveDecoder(head, context).sample_token(
            0, bits, torch.rand(count, 10), 1.0
        )
        every = (
            torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 9)
            .unsqueeze(1)
            .expand(-1, int(block), -1)
        )
        law = head.output.log_prob(
            head.autoregress(every, head.condition(hidden.expand(512, -1, -1))), every
        )

    # frequencies of the 2^9 codes, against their probabilities
    number = ((drawn > 0) * 2 ** torch.arange(8, -1, -1)).sum(-1)
    share = number.bincount(minlength=512) / count

    torch.testing.assert_close(share, law[:, 0].exp(), rtol=0, atol=6 * (0.25 / count) ** 0.5)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ablation("no_input_condition"),
        NO_TABLES,
    ],
)
def test_a_chain_decoded_token_by_token_is_the_chain_of_one_pass(overrides, tiny_model, seed):
    head = tiny_model(*overrides).head
    if overrides != NO_TABLES:  # the decoder's raw output is that before any group table
        torch.nn.init.zeros_(head.conditional_group_logits.rows)
    clean = torch.randn(5, 4, 9).sign()
    context = head.condition(torch.randn(5, 4, 32))
    decoder = AutoregressiveDecoder(head, context)
    whole = head.autoregress(clean, context)

    # a prompt may fix the token between, so positions can be skipped
    for i in (0, 1, 3):
        raw, _ = decoder(i, clean)
        torch.testing.assert_close(raw, whole[:, i], rtol=1e-4, atol=1e-5)


def test_left_to_right_shows_the_tokens_before_clean_and_the_others_as_noise(tiny_model, seed):
    head = tiny_model(*ablation("no_autoregressive_pass", *NO_PASS)).head
    bits = torch.randn(5, 4, 9)
    context = head.condition(torch.randn(5, 4, 32))
    t = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(5, 4)
    torch.testing.assert_close(
        DenoisingDecoder(head, context)(2, bits), head.denoise(bits, t, context)[:, 2]
    )


def test_a_dropped_context_is_the_null_state(tiny_model, seed):
    head = tiny_model().head
    torch.nn.init.normal_(head.null_embedding)
    hidden = torch.randn(5, 4, 32)
    keep = torch.tensor([True, False, True, False, False])
    dropped = head.condition(hidden, keep)
    kept = head.condition(hidden)
    null = head.unconditional(kept)

    torch.testing.assert_close(dropped.projected[~keep], null.projected[~keep])
    torch.testing.assert_close(dropped.projected[keep], kept.projected[keep])


def test_modulation_layers_are_shared_by_runs_of_blocks(tiny):
    head = head_of(tiny, "--head.num_layers", "5", "--head.num_adaln_layers", "2")
    assert (len(head.blocks), len(head.modulations)) == (5, 2)
    head.denoise(torch.randn(2, 4, 9), torch.rand(2, 4), head.condition(torch.randn(2, 4, 32)))


def test_posteriors_and_losses_stay_fp32_with_weights_in_bf16(tiny_model, tiny, seed):
    model = tiny_model()
    head = model.head
    noisy = torch.randn(6, 4, 9)
    t = torch.rand(6, 4)
    hidden = torch.randn(6, 4, 32)
    clean = torch.randn(6, 4, 9).sign()
    exact = head.output.log_prob(head.autoregress(clean, head.condition(hidden)), clean)
    cast_weights(model, tiny("--training.precision", "bf16"))
    context = head.condition(hidden.bfloat16())
    raw = head.denoise(noisy, t, context)
    out = denoised(head, noisy, t, context)

    assert raw.dtype == torch.bfloat16
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, head.output.denoise(raw, head.output.channel_logits(noisy, t)))

    # bf16 keeps 8 bits, so the value itself may differ by a few percent
    log_prob = head.output.log_prob(head.autoregress(clean, context), clean)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, exact, rtol=0.05, atol=0.05)
