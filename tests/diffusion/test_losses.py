"""The six reference values of the objective, and the losses against their formulas."""

import math

import pytest
import torch

from bitlm_dist.diffusion import losses
from bitlm_dist.diffusion.process import (
    add_noise,
    half_channel_logits,
    logit_normal_time,
    time_density,
)

COUNT = 2_000_000


def drawn(law, generator):
    t = (
        torch.rand(COUNT, generator=generator)
        if law == "uniform"
        else logit_normal_time(torch.randn(COUNT, generator=generator))
    )
    clean = torch.randint(0, 2, (COUNT, 1), generator=generator) * 2.0 - 1
    noisy = add_noise(clean, torch.randn(COUNT, 1, generator=generator), t)
    return t, clean, noisy


def loss_of(kind, clean, denoised, t):
    return (
        (losses.x_loss(clean, denoised) if kind == "x" else losses.v_loss(clean, denoised, t))
        .mean()
        .item()
    )


@pytest.mark.parametrize(
    ("kind", "law", "expected"),
    [
        ("x", "uniform", 0.46),
        ("x", "logit_normal", 0.73),
        ("v", "uniform", 1.02),
        ("v", "logit_normal", 1.56),
    ],
)
def test_best_predictor_without_context(kind, law, expected):
    t, clean, noisy = drawn(law, torch.Generator().manual_seed(0))
    assert loss_of(kind, clean, torch.tanh(half_channel_logits(noisy, t)), t) == pytest.approx(
        expected, abs=0.0075
    )


@pytest.mark.parametrize(("kind", "expected"), [("x", 1.0), ("v", 2.96)])
def test_zero_output_network(kind, expected):
    t, clean, _ = drawn("logit_normal", torch.Generator().manual_seed(0))
    assert loss_of(kind, clean, torch.zeros_like(clean), t) == pytest.approx(expected, abs=0.0075)


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_elbo_loss_of_the_channel_posterior_is_ln_2_a_bit(law):
    t, clean, noisy = drawn(law, torch.Generator().manual_seed(0))
    loss = losses.elbo_loss(clean, torch.tanh(half_channel_logits(noisy, t)), t, law)
    assert loss.mean().item() == pytest.approx(math.log(2), abs=0.02)


def test_time_density_integrates_to_one():
    t = torch.linspace(1e-4, 1 - 1e-4, 100_001, dtype=torch.float64)
    assert torch.trapezoid(time_density(t, "logit_normal"), t).item() == pytest.approx(1, abs=1e-4)
