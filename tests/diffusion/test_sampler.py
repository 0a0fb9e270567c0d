from functools import partial

import pytest
import torch

from bitlm_dist.diffusion.outputs import MixtureOutput
from bitlm_dist.diffusion.sampler import (
    PromptTokens,
    classifier_free_guidance,
    ode_sample,
    sde_sample,
    sequential_sample,
    sign,
)

LAW = MixtureOutput(2, 2, 1)
PROBABILITIES = torch.tensor([0.45, 0.05, 0.1, 0.4])
RAW = torch.cat((torch.zeros(1), PROBABILITIES.log()))


def exact(noisy, t):
    return LAW.denoise(RAW.expand(*noisy.shape[:-1], -1), LAW.channel_logits(noisy, t))


def levels(denoise):
    """Turn a function of (noisy, t) into the denoisers that samplers expect."""
    return lambda times: [partial(denoise, t=t) for t in times]


def frequencies(bits):
    index = ((bits > 0) * 2 ** torch.arange(2)).sum(-1).flatten()
    return index.bincount(minlength=4) / index.numel()


def test_ode_and_sde_sample_the_law_of_an_exact_denoiser(seed):
    start = torch.randn(40_000, 1, 2)
    known = PromptTokens.empty(start)
    ode = ode_sample(levels(exact), start, 50, prompt_tokens=known)
    sde = sde_sample(
        levels(exact), start, 100, lambda step: torch.randn_like(start), prompt_tokens=known
    )

    assert (ode.head_passes, sde.head_passes) == (50, 100)

    for sampled in (ode, sde):
        torch.testing.assert_close(frequencies(sampled.bits), PROBABILITIES, rtol=0, atol=0.03)


def test_sequential_samples_the_law_and_makes_m_passes(seed):
    start = torch.randn(40_000, 3, 2)
    draw = lambda i, bits: LAW.sample(RAW.expand(len(bits), -1), torch.rand(len(bits), 3), 1.0)  # noqa: E731
    sampled = sequential_sample(draw, start, prompt_tokens=PromptTokens.empty(start))
    assert sampled.head_passes == 3
    torch.testing.assert_close(frequencies(sampled.bits), PROBABILITIES, rtol=0, atol=0.01)


def test_sequential_shows_each_token_the_clean_ones_before_it(seed):
    start = torch.randn(5, 3, 2)
    seen = []

    def draw(i, noisy):
        seen.append((i, noisy.clone()))
        return torch.randn(5, 2).sign()

    bits = sequential_sample(draw, start, prompt_tokens=PromptTokens.empty(start)).bits
    assert [i for i, _ in seen] == [0, 1, 2]

    for i, noisy in seen:
        assert torch.equal(noisy[:, :i], bits[:, :i])
        assert torch.equal(noisy[:, i:], start[:, i:])


@pytest.mark.parametrize("sampler", ["ode", "sde", "sequential"])
def test_known_tokens_are_clamped_at_every_step_and_returned(sampler, seed):
    start = torch.randn(7, 4, 2)
    known = PromptTokens(
        torch.randn(7, 4, 2).sign(), (torch.arange(4) < 2).expand(7, 4), has_per_token_time=True
    )
    seen = []

    def denoise(noisy, t):
        seen.append((noisy, t))
        return exact(noisy, t)

    if sampler == "ode":
        result = ode_sample(levels(denoise), start, 5, prompt_tokens=known)
    elif sampler == "sde":
        result = sde_sample(
            levels(denoise), start, 5, lambda step: torch.randn_like(start), prompt_tokens=known
        )
    else:
        draw = lambda i, noisy: seen.append((noisy, torch.zeros(7, 4))) or torch.randn(7, 2).sign()  # noqa: E731
        result = sequential_sample(draw, start, prompt_tokens=known)
        assert result.head_passes == 2

    assert torch.equal(result.bits[:, :2], known.bits[:, :2])

    for noisy, t in seen:
        assert torch.equal(noisy[:, :2], known.bits[:, :2])
        assert (t[:, :2] == 0).all()


def test_adaptive_stopping_saves_passes(seed):
    start = torch.randn(3, 1, 2)
    certain = levels(lambda noisy, t: torch.ones_like(noisy))

    assert (
        ode_sample(
            certain, start, 20, prompt_tokens=PromptTokens.empty(start), confidence=0.99
        ).head_passes
        == 1
    )
    assert ode_sample(certain, start, 20, prompt_tokens=PromptTokens.empty(start)).head_passes == 20


def test_ode_is_the_paper_update(seed):
    """Compare with the update A <- (t'/t)·A + (1 - t'/t)·A0_hat, written out."""
    start = torch.randn(3, 2, 2)
    a = start

    for k in (4, 3, 2, 1):
        t = k / 4
        s = (k - 1) / 4
        estimate = exact(a, torch.full((3, 2), t))
        a = s / t * a + (1 - s / t) * estimate

    assert torch.equal(
        ode_sample(levels(exact), start, 4, prompt_tokens=PromptTokens.empty(start)).bits, sign(a)
    )


def test_guidance_is_u_plus_s_times_the_difference():
    c = levels(lambda noisy, t: noisy + t)
    u = levels(lambda noisy, t: 0.2 * t)
    for t, step in zip(
        (0.5, 0.9), classifier_free_guidance(c, u, 9.0)(torch.tensor([0.5, 0.9])), strict=True
    ):
        assert step(torch.tensor(0.3)).item() == pytest.approx(0.2 * t + 9 * (0.3 + 0.8 * t))
