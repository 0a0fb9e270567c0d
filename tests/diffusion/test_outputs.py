"""Output distributions against plain enumeration in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from bitlm_dist.diffusion.outputs import BitOutput, MixtureOutput
from bitlm_dist.diffusion.process import half_channel_logits

LAWS = [(5, 2, 3), (6, 3, 2), (4, 1, 1), (7, 3, 4)]  # bits, group, components


def token_log_probs(law, raw):
    """Enumerate all 2^K bit vectors: their bits [2^K, K] and log priors [2^K]."""
    raw = raw.double()
    weights = raw[: law.num_components].log_softmax(-1)
    logits = raw[law.num_components :].view(law.num_components, law.num_groups, -1)
    bits = torch.tensor(
        list(itertools.product([-1.0, 1.0], repeat=law.num_bits)), dtype=torch.float64
    )
    total = []

    for k in range(law.num_components):
        log_prob = weights[k].expand(len(bits)).clone()
        for g in range(law.num_groups):
            # the last group may be shorter
            width = min(law.bits_per_group, law.num_bits - g * law.bits_per_group)
            patterns = logits[k, g, : 2**width].log_softmax(-1)
            index = (
                (bits[:, g * law.bits_per_group : g * law.bits_per_group + width] > 0)
                * 2 ** torch.arange(width)
            ).sum(-1)
            log_prob += patterns[index]
        total.append(log_prob)

    return bits, torch.stack(total).logsumexp(0)


@pytest.mark.parametrize("shape", LAWS)
def test_mixture_equals_enumeration(shape, seed):
    law = MixtureOutput(*shape)
    for t in (0.2, 0.5, 0.9, 1.0):
        raw = torch.randn(law.num_logits)
        noisy = torch.randn(law.num_bits)
        clean = torch.randn(law.num_bits).sign()
        level = torch.tensor([[t]])
        bits, prior = token_log_probs(law, raw)
        field = (1 - t) * noisy.double() / t**2
        posterior = (prior + bits @ field).log_softmax(-1)
        truth = int((bits == clean).all(-1).nonzero())
        args = (raw.view(1, 1, -1), noisy.view(1, 1, -1), level)
        loss = law.loss(*args, clean.view(1, 1, -1)) * law.num_bits

        torch.testing.assert_close(loss.item(), -posterior[truth].item(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            law.denoise(args[0], law.channel_logits(*args[1:]))[0, 0].double(),
            posterior.exp() @ bits,
            rtol=1e-4,
            atol=1e-4,
        )

        log_prob = law.log_prob(raw.view(1, 1, -1), clean.view(1, 1, -1))
        torch.testing.assert_close(log_prob.item(), prior[truth].item(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", LAWS)
@pytest.mark.parametrize("pure", [False, True])
def test_mixture_gradient_equals_finite_differences_of_the_enumeration(shape, pure, seed):
    law = MixtureOutput(*shape)
    raw = torch.randn(law.num_logits, requires_grad=True)
    noisy = torch.randn(law.num_bits)
    clean = torch.randn(law.num_bits).sign()
    t = 1.0 if pure else 0.6
    args = (raw.view(1, 1, -1), noisy.view(1, 1, -1), torch.tensor([[t]]), clean.view(1, 1, -1))
    value = -law.log_prob(args[0], args[3]) if pure else law.loss(*args) * law.num_bits
    (got,) = torch.autograd.grad(value.sum(), raw)

    # the same gradient from the enumeration in fp64
    exact = raw.detach().double().requires_grad_()
    bits, prior = token_log_probs(law, exact)
    posterior = (prior + bits @ ((1 - t) * noisy.double() / t**2)).log_softmax(-1)
    (expected,) = torch.autograd.grad(-posterior[int((bits == clean).all(-1).nonzero())], exact)

    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_bits_without_doubt_are_read_as_they_are_however_unlikely(seed):
    """The prior of the true pattern underflows in fp32, while the channel is certain of it."""
    law = MixtureOutput(6, 3, 2)
    clean = torch.randn(1, 1, 6).sign()
    raw = torch.zeros(1, 1, law.num_logits)
    logits = raw[..., law.num_components :].view(law.num_components, law.num_groups, -1)
    logits[:] = (
        200.0
        * (torch.arange(8) != ((clean.view(2, 1, 3) > 0) * 2 ** torch.arange(3)).sum(-1)).float()
    )

    for t in (0.01, 0.03):
        torch.testing.assert_close(
            law.denoise(raw, law.channel_logits(clean, torch.full((1, 1), t))), clean
        )


def test_slices_do_not_change_the_result(seed, monkeypatch):
    from bitlm_dist.diffusion import mixture

    law = MixtureOutput(12, 6, 8)
    raw = torch.randn(50, 4, law.num_logits, requires_grad=True)
    noisy = torch.randn(50, 4, 12)
    t = torch.rand(50, 4)
    clean = noisy.sign()

    def results():
        loss = law.loss(raw, noisy, t, clean)
        return (
            loss,
            *torch.autograd.grad(loss.sum(), raw),
            law.posterior_features(raw, law.channel_logits(noisy, t)),
        )

    whole = results()
    monkeypatch.setattr(mixture, "CPU_SLICE_NUMEL", law.num_logits * 7)
    for a, b in zip(whole, results(), strict=True):
        torch.testing.assert_close(a, b)


def test_one_group_of_one_bit_is_bce_with_channel_skip(seed):
    mixture = MixtureOutput(6, 1, 1)
    raw = torch.randn(9, 4, 6)
    noisy = torch.randn(9, 4, 6)
    t = torch.rand(9, 4) * 0.9 + 0.1
    clean = torch.randn(9, 4, 6).sign()

    # the same raw output as pattern logits of -1 and +1
    pairs = torch.stack((torch.zeros_like(raw), raw), -1).flatten(-2)
    raw2 = torch.cat((torch.zeros(9, 4, 1), pairs), -1)

    posterior_logits = raw + 2 * half_channel_logits(noisy, t)
    loss = F.binary_cross_entropy_with_logits(
        posterior_logits, (clean > 0).float(), reduction="none"
    ).mean(-1)
    torch.testing.assert_close(mixture.loss(raw2, noisy, t, clean), loss, rtol=1e-4, atol=1e-4)

    denoised = mixture.denoise(raw2, mixture.channel_logits(noisy, t))
    torch.testing.assert_close(denoised, torch.tanh(posterior_logits / 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["x", "v", "elbo"])
def test_zero_output_without_skip_denoises_to_zero(kind):
    law = BitOutput(6, kind, "uniform")
    raw = torch.zeros(3, 4, 6)
    noisy = torch.randn(3, 4, 6)
    t = torch.full((3, 4), 0.5)

    assert not law.denoise(raw, law.channel_logits(noisy, t)).any()

    expected = {"x": 1.0, "v": 4.0, "elbo": 4.0}[kind]
    torch.testing.assert_close(
        law.loss(raw, noisy, t, torch.ones(3, 4, 6)), torch.full((3, 4), expected)
    )


def test_sampling_follows_the_law(seed):
    law = MixtureOutput(5, 2, 3)
    raw = torch.randn(law.num_logits) * 2
    bits, prior = token_log_probs(law, raw)
    count = 200_000
    drawn = law.sample(raw.expand(count, 1, -1), torch.rand(count, 1, 6), 1.0).squeeze(1)

    # itertools.product makes the first bit the most significant
    index = ((drawn > 0) * 2 ** torch.arange(4, -1, -1)).sum(-1)
    share = index.bincount(minlength=32) / count

    torch.testing.assert_close(share.double(), prior.exp(), rtol=0, atol=6 * (0.25 / count) ** 0.5)
    assert len(bits) == 32


def test_temperature_zero_takes_the_likeliest_pattern(seed):
    law = MixtureOutput(6, 3, 1)
    raw = torch.randn(1, 1, law.num_logits).expand(64, 1, -1)
    drawn = law.sample(raw, torch.rand(64, 1, 7), 0.0)
    assert (drawn == drawn[0]).all()
    bits, prior = token_log_probs(law, raw[0, 0])
    assert torch.equal(drawn[0, 0].double(), bits[prior.argmax()])
