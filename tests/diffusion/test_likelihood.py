import math
from functools import partial

import pytest
import torch

from bitlm_dist.diffusion.likelihood import (
    autoregressive_nll,
    estimate_nelbo,
    noise_level_times,
    reconstruction_nll,
)
from bitlm_dist.diffusion.noise import NoiseKey
from bitlm_dist.diffusion.outputs import MixtureOutput
from bitlm_dist.diffusion.process import half_channel_logits


def score(denoise, clean, seed=3, strata=16):
    count = len(clean)
    everything = torch.ones(clean.shape[:-1], dtype=torch.bool)
    sample = torch.arange(count)
    denoisers = lambda times: [partial(denoise, t=t) for t in times]  # noqa: E731
    return estimate_nelbo(
        denoisers,
        clean,
        num_noise_levels=strata,
        noise_key=NoiseKey(seed, sample, sample % 5),
        valid=everything,
    )


def channel(noisy, t):
    return torch.tanh(half_channel_logits(noisy, t))


def test_one_fair_bit_costs_ln_2():
    clean = torch.randint(0, 2, (200_000, 1, 1)) * 2.0 - 1
    nats = score(channel, clean, strata=4).nelbo
    error = nats.std() / math.sqrt(nats.numel())
    assert abs(nats.mean() - math.log(2)) < 4 * error
    assert error < 0.005


@pytest.mark.parametrize(("tokens", "bits"), [(1, 12), (4, 18)])
def test_a_head_that_knows_only_the_channel_costs_b_ln_2_a_token(tokens, bits, seed):
    clean = torch.randint(0, 2, (4000, tokens, bits)) * 2.0 - 1
    nats = score(channel, clean).nelbo.mean(-1)
    error = float(nats.std()) / math.sqrt(len(nats))
    assert abs(float(nats.mean()) - bits * math.log(2)) < 4 * error


def test_the_bound_is_tight_for_an_exact_denoiser_of_correlated_bits(seed):
    """With P(++) = P(--) = 0.45, the bound must equal the entropy of the pair."""
    law = MixtureOutput(2, 2, 1)
    probabilities = torch.tensor([0.45, 0.05, 0.05, 0.45])
    raw = torch.cat((torch.zeros(1), probabilities.log()))
    index = torch.multinomial(probabilities, 10_000, replacement=True)
    clean = law.patterns[index].unsqueeze(1)

    def denoise(noisy, t):
        return law.denoise(raw.expand(*noisy.shape[:-1], -1), law.channel_logits(noisy, t))

    # per-sample differences have far less variance than the two means
    nats = score(denoise, clean).nelbo.squeeze(-1)
    truth = -probabilities.log()[index]
    error = float((nats - truth).std()) / math.sqrt(len(nats))

    assert abs(float((nats - truth).mean())) < 4 * error


def test_a_perfect_denoiser_costs_nothing():
    clean = torch.randn(50, 4, 6).sign()
    result = score(lambda noisy, t: clean, clean)
    assert result.nelbo.max() < 1e-5
    assert (result.bit_accuracy == 1).all()


def test_reconstruction_is_negligible_at_5_and_ln_2_at_0():
    assert reconstruction_nll(0.0) == pytest.approx(math.log(2))
    assert reconstruction_nll(5.0) < 1e-5


def test_strata_run_from_noisy_to_clean():
    times = noise_level_times(8)
    assert (times[1:] < times[:-1]).all()
    assert times[0] < 1


def test_chain_rule_sums_the_conditionals():
    """For a bigram model, the cost is that of its conditional distribution."""
    law = MixtureOutput(3, 3, 1)
    table = torch.randn(9, 8)  # row: pattern of the previous token, 8 = none (open)
    clean = torch.randn(500, 2, 3).sign()
    index = ((clean > 0) * 2 ** torch.arange(3)).sum(-1)

    def raw(noisy, t):
        pattern = ((noisy > 0) * 2 ** torch.arange(3)).sum(-1)
        before = torch.where(t[:, 0] == 0, pattern[:, 0], 8)
        logits = torch.stack((table[torch.full_like(before, 8)], table[before]), 1)
        return torch.cat((torch.zeros(len(t), 2, 1), logits), -1)

    sample = torch.arange(500)
    nats = autoregressive_nll(raw, law, clean, NoiseKey(0, sample, sample))
    log_table = table.log_softmax(-1)
    expected = torch.stack((-log_table[8][index[:, 0]], -log_table[index[:, 0], index[:, 1]]), -1)

    torch.testing.assert_close(nats, expected)
