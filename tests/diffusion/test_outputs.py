"""Output laws against plain enumeration in fp64."""

import itertools

import pytest
import torch

from bitlm_dist.diffusion.outputs import BitOutput, MixtureOutput

LAWS = [(5, 2, 3), (6, 3, 2), (4, 1, 1), (7, 3, 4)]  # bits, group, components


def token_log_probs(law, raw):
    """log prior of every one of the 2^K bit vectors, by enumeration: -> bits [2^K, K], [2^K]."""
    raw = raw.double()
    weights = raw[: law.components].log_softmax(-1)
    logits = raw[law.components :].view(law.components, law.groups, -1)
    bits = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=law.bits)), dtype=torch.float64)
    total = []
    for k in range(law.components):
        log_prob = weights[k].expand(len(bits)).clone()
        for g in range(law.groups):
            width = min(law.group, law.bits - g * law.group)
            patterns = logits[k, g, : 2**width].log_softmax(-1)
            index = ((bits[:, g * law.group : g * law.group + width] > 0) * 2 ** torch.arange(width)).sum(-1)
            log_prob += patterns[index]
        total.append(log_prob)
    return bits, torch.stack(total).logsumexp(0)


@pytest.mark.parametrize("shape", LAWS)
def test_mixture_equals_enumeration(shape, seed):
    law = MixtureOutput(*shape)
    for t in (0.2, 0.5, 0.9, 1.0):
        raw, noisy, clean = torch.randn(law.size), torch.randn(law.bits), torch.randn(law.bits).sign()
        level = torch.tensor([[t]])
        bits, prior = token_log_probs(law, raw)
        field = (1 - t) * noisy.double() / t**2
        posterior = (prior + bits @ field).log_softmax(-1)
        truth = int((bits == clean).all(-1).nonzero())
        args = (raw.view(1, 1, -1), noisy.view(1, 1, -1), level)
        loss = law.loss(*args, clean.view(1, 1, -1)) * law.bits
        torch.testing.assert_close(loss.item(), -posterior[truth].item(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            law.denoise(args[0], law.field(*args[1:]))[0, 0].double(), posterior.exp() @ bits, rtol=1e-4, atol=1e-4
        )
        log_prob = law.log_prob(raw.view(1, 1, -1), clean.view(1, 1, -1))
        torch.testing.assert_close(log_prob.item(), prior[truth].item(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", LAWS)
@pytest.mark.parametrize("pure", [False, True])
def test_mixture_gradient_equals_finite_differences_of_the_enumeration(shape, pure, seed):
    law = MixtureOutput(*shape)
    raw, noisy, clean = torch.randn(law.size, requires_grad=True), torch.randn(law.bits), torch.randn(law.bits).sign()
    t = 1.0 if pure else 0.6
    args = (raw.view(1, 1, -1), noisy.view(1, 1, -1), torch.tensor([[t]]), clean.view(1, 1, -1))
    value = -law.log_prob(args[0], args[3]) if pure else law.loss(*args) * law.bits
    (got,) = torch.autograd.grad(value.sum(), raw)
    exact = raw.detach().double().requires_grad_()
    bits, prior = token_log_probs(law, exact)
    posterior = (prior + bits @ ((1 - t) * noisy.double() / t**2)).log_softmax(-1)
    (expected,) = torch.autograd.grad(-posterior[int((bits == clean).all(-1).nonzero())], exact)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_bits_without_doubt_are_read_as_they_are_however_unlikely(seed):
    """A model that gives the true pattern no fp32 probability at all, and a channel that leaves no doubt about it."""
    law = MixtureOutput(6, 3, 2)
    clean = torch.randn(1, 1, 6).sign()
    raw = torch.zeros(1, 1, law.size)
    logits = raw[..., law.components :].view(law.components, law.groups, -1)
    logits[:] = 200.0 * (torch.arange(8) != ((clean.view(2, 1, 3) > 0) * 2 ** torch.arange(3)).sum(-1)).float()
    for t in (0.01, 0.03):
        torch.testing.assert_close(law.denoise(raw, law.field(clean, torch.full((1, 1), t))), clean)


def test_slices_do_not_change_the_result(seed, monkeypatch):
    from bitlm_dist.diffusion import mixture

    law = MixtureOutput(12, 6, 8)
    raw, noisy, t = torch.randn(50, 4, law.size, requires_grad=True), torch.randn(50, 4, 12), torch.rand(50, 4)
    clean = noisy.sign()

    def results():
        loss = law.loss(raw, noisy, t, clean)
        return loss, *torch.autograd.grad(loss.sum(), raw), law.evidence(raw, law.field(noisy, t))

    whole = results()
    monkeypatch.setattr(mixture, "CPU_SLICE", law.size * 7)
    for a, b in zip(whole, results(), strict=True):
        torch.testing.assert_close(a, b)


def test_one_group_of_one_bit_is_bce_with_channel_skip(seed):
    mixture, bit = MixtureOutput(6, 1, 1), BitOutput(6, "bce", "tanh", True, "uniform")
    raw, noisy, t = torch.randn(9, 4, 6), torch.randn(9, 4, 6), torch.rand(9, 4) * 0.9 + 0.1
    clean = torch.randn(9, 4, 6).sign()
    pairs = torch.stack((torch.zeros_like(raw), raw), -1).flatten(-2)  # logits of -1 and +1
    raw2 = torch.cat((torch.zeros(9, 4, 1), pairs), -1)
    torch.testing.assert_close(mixture.loss(raw2, noisy, t, clean), bit.loss(raw, noisy, t, clean), rtol=1e-4, atol=1e-4)
    one, other = mixture.denoise(raw2, mixture.field(noisy, t)), bit.denoise(raw, bit.field(noisy, t))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["x", "v", "elbo"])
def test_zero_output_without_skip_denoises_to_zero(kind):
    law = BitOutput(6, kind, "none", False, "uniform")
    raw, noisy, t = torch.zeros(3, 4, 6), torch.randn(3, 4, 6), torch.full((3, 4), 0.5)
    assert not law.denoise(raw, law.field(noisy, t)).any()
    expected = {"x": 1.0, "v": 4.0, "elbo": 4.0}[kind]
    torch.testing.assert_close(law.loss(raw, noisy, t, torch.ones(3, 4, 6)), torch.full((3, 4), expected))


def test_sampling_follows_the_law(seed):
    law = MixtureOutput(5, 2, 3)
    raw = torch.randn(law.size) * 2
    bits, prior = token_log_probs(law, raw)
    count = 200_000
    drawn = law.sample(raw.expand(count, 1, -1), torch.rand(count, 1, 6), 1.0).squeeze(1)
    index = ((drawn > 0) * 2 ** torch.arange(4, -1, -1)).sum(-1)  # itertools counts the first bit as the highest
    share = index.bincount(minlength=32) / count
    torch.testing.assert_close(share.double(), prior.exp(), rtol=0, atol=6 * (0.25 / count) ** 0.5)
    assert len(bits) == 32


def test_temperature_zero_takes_the_likeliest_pattern(seed):
    law = MixtureOutput(6, 3, 1)
    raw = torch.randn(1, 1, law.size).expand(64, 1, -1)
    drawn = law.sample(raw, torch.rand(64, 1, 7), 0.0)
    assert (drawn == drawn[0]).all()
    bits, prior = token_log_probs(law, raw[0, 0])
    assert torch.equal(drawn[0, 0].double(), bits[prior.argmax()])
