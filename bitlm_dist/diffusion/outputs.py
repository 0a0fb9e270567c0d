"""What the head's raw output means: a distribution of the clean bits given the noisy ones.

Two laws behind one interface. :class:`BitOutput` gives one number a bit (paper, Eq. 12, with the switches of the method);
:class:`MixtureOutput` gives, for each token, a mixture of products of distributions over groups of bits.

Legend: N blocks (any leading shape), M tokens a block, K bits, R mixture components, G groups, g bits a group, P = 2^g patterns.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.diffusion import losses
from bitlm_dist.diffusion.mixture import mixture_marginals, mixture_nll, pattern_probabilities, posterior_marginals, split
from bitlm_dist.diffusion.process import channel_field

Reader = Callable[[Tensor], Tensor]
After = Callable[[int, Tensor], Tensor]


class Output(Protocol):
    """The interface of an output law. ``raw`` is [N, M, size]; noisy and clean bits are [N, M, K]; t is [N, M]; ``field`` is what
    :meth:`field` returns.
    """

    size: int
    evidence_size: int

    def field(self, noisy: Tensor, t: Tensor) -> Tensor:
        """What the noisy bits say of the clean ones: added to the law's logits it makes the posterior."""
        ...

    def denoise(self, raw: Tensor, field: Tensor) -> Tensor:
        """A0_hat, the estimate of the clean bits [N, M, K]."""
        ...

    def loss(self, raw: Tensor, noisy: Tensor, t: Tensor, clean: Tensor) -> Tensor:
        """Training loss of each token [N, M], a mean over its bits."""
        ...

    def evidence(self, raw: Tensor, field: Tensor) -> Tensor:
        """The posterior as features [N, M, evidence_size] for the head's input."""
        ...

    def reader(self, raw: Tensor) -> Reader:
        """:meth:`evidence` of one ``raw`` for many fields -> features."""
        ...

    def log_prob(self, raw: Tensor, clean: Tensor) -> Tensor:
        """log-probability [N, M] of the tokens' bits when nothing but ``raw`` is known (pure noise)."""
        ...

    def sample(self, raw: Tensor, u: Tensor, temperature: float) -> Tensor:
        """Bits [..., K] drawn from the same law with uniform numbers u [..., K + 1]."""
        ...


class BitOutput:
    """One number a bit.

    Args:
        bits: K.
        loss: ``x``, ``v``, ``bce`` or ``elbo``.
        squash: ``tanh`` (A0_hat = tanh(o/2)) or ``none`` (A0_hat = o); bce always reads o as a logit.
        channel_skip: add the channel's own log-odds 2·lambda to o, so that the network learns only what context knows.
        time_law: the law of t in training, needed by the ``elbo`` weight.
    """

    def __init__(self, bits: int, loss: str, squash: str, channel_skip: bool, time_law: str) -> None:
        self.size = self.evidence_size = bits
        self.kind, self.squash, self.channel_skip, self.time_law = loss, squash, channel_skip, time_law

    def field(self, noisy: Tensor, t: Tensor) -> Tensor:
        """See :class:`Output`: [N, M, K], or zero without the channel's skip."""
        return 2 * channel_field(noisy, t) if self.channel_skip else noisy.new_zeros(())

    def denoise(self, raw: Tensor, field: Tensor) -> Tensor:
        """See :class:`Output`."""
        logits = raw.float() + field
        return torch.tanh(logits / 2) if self.squash == "tanh" else logits

    def loss(self, raw: Tensor, noisy: Tensor, t: Tensor, clean: Tensor) -> Tensor:
        """See :class:`Output`."""
        field = self.field(noisy, t)
        if self.kind == "bce":
            return losses.bce_loss(clean, raw.float() + field)
        denoised = self.denoise(raw, field)
        if self.kind == "x":
            return losses.x_loss(clean, denoised)
        if self.kind == "v":
            return losses.v_loss(clean, denoised, t)
        return losses.elbo_loss(clean, denoised, t, self.time_law)

    def evidence(self, raw: Tensor, field: Tensor) -> Tensor:
        """See :class:`Output`."""
        return self.denoise(raw, field)

    def reader(self, raw: Tensor) -> Reader:
        """See :class:`Output`."""
        return partial(self.denoise, raw)

    def log_prob(self, raw: Tensor, clean: Tensor) -> Tensor:
        """See :class:`Output`; at pure noise the channel adds nothing."""
        return -F.softplus(-clean * raw.float()).sum(-1)

    def sample(self, raw: Tensor, u: Tensor, temperature: float) -> Tensor:
        """See :class:`Output`; temperature 0 takes the likelier value of each bit."""
        return torch.where(u[..., :-1] < _sharpen(raw.float(), temperature).sigmoid(), 1.0, -1.0)


class MixtureOutput(nn.Module):
    """A mixture of R products over groups of g bits; the posterior given noisy bits is closed form (method, section 9 a and d).

    Raw output of a token: R mixture logits, then R x G x P pattern logits. Where the last group is shorter than g, the
    surplus patterns are masked. g = 1 and R = 1 is the per-bit law with bce and channel skip.

    Args:
        bits: K.
        group: g.
        components: R.
    """

    patterns: Tensor  # [P, g] in {-1, +1}
    surplus: Tensor  # [G, P], -inf at patterns that the group does not have

    def __init__(self, bits: int, group: int, components: int) -> None:
        super().__init__()
        self.bits, self.group, self.components = bits, group, components
        self.groups = math.ceil(bits / group)
        self.evidence_size = self.groups * 2**group
        self.size = components * (1 + self.evidence_size)
        number = torch.arange(2**group)
        places = torch.arange(group)
        missing = self.groups * group - bits  # bits that the last group lacks
        surplus = torch.zeros(self.groups, 2**group)
        surplus[-1, 2 ** (group - missing) :] = -math.inf
        self.register_buffer("patterns", (2 * (number[:, None] >> places & 1) - 1).float(), persistent=False)
        self.register_buffer("surplus", surplus, persistent=False)

    def field(self, noisy: Tensor, t: Tensor) -> Tensor:
        """See :class:`Output`: <lambda_g, phi_p> for every group and pattern, [N·M, G, P]."""
        return (self._grouped(channel_field(noisy, t)) @ self.patterns.T).flatten(0, -3)

    def _grouped(self, bits: Tensor) -> Tensor:
        """[N, M, K] -> [N, M, G, g], zeros in the places that the last group lacks."""
        return F.pad(bits, (0, self.groups * self.group - self.bits)).unflatten(-1, (self.groups, self.group))

    def _nll(self, raw: Tensor, clean: Tensor, field: Tensor | None) -> Tensor:
        index = self.index(clean).flatten(0, -2)
        return mixture_nll(raw.flatten(0, -2), field, index, self.surplus).view(raw.shape[:-1])

    def index(self, clean: Tensor) -> Tensor:
        """Clean bits [..., K] -> the number of each group's pattern, [..., G]."""
        places = 2 ** torch.arange(self.group, device=clean.device)
        return ((self._grouped(clean) > 0) * places).sum(-1)

    def evidence(self, raw: Tensor, field: Tensor) -> Tensor:
        """See :class:`Output`: the posterior marginals of all patterns, [N, M, G·P], without gradient."""
        marginals = mixture_marginals(raw.flatten(0, -2), field, self.surplus)
        return marginals.flatten(-2).view(*raw.shape[:-1], -1)

    @torch.no_grad()
    def reader(self, raw: Tensor) -> Reader:
        """See :class:`Output`; keeps the pattern probabilities, as large as ``raw``."""
        weights, patterns = pattern_probabilities(raw.flatten(0, -2), self.surplus)

        def read(field: Tensor) -> Tensor:
            marginals = posterior_marginals(weights, patterns, field, self.surplus)
            return marginals.flatten(-2).view(*raw.shape[:-1], -1)

        return read

    def denoise(self, raw: Tensor, field: Tensor) -> Tensor:
        """See :class:`Output`: the posterior mean, bounded by construction; without gradient."""
        marginals = self.evidence(raw, field).unflatten(-1, (self.groups, -1))
        return (marginals @ self.patterns).flatten(-2)[..., : self.bits]

    def loss(self, raw: Tensor, noisy: Tensor, t: Tensor, clean: Tensor) -> Tensor:
        """See :class:`Output`: -log posterior of the clean token, in nats a bit."""
        return self._nll(raw, clean, self.field(noisy, t)) / self.bits

    def log_prob(self, raw: Tensor, clean: Tensor) -> Tensor:
        """See :class:`Output`."""
        return -self._nll(raw, clean, None)

    def sample(self, raw: Tensor, u: Tensor, temperature: float, after: After | None = None) -> Tensor:
        """See :class:`Output`: a component, then each group of it; temperature divides all logits, 0 takes the likeliest.

        Args:
            after: (j, patterns [...] of group j - 1) -> what is added to the logits of group j in all components, [..., P].
        """
        weights, logits = split(raw, self.components, self.surplus)
        component = _pick(_sharpen(weights, temperature).softmax(-1), u[..., -1:])
        chosen = logits.gather(-3, component[..., None, None, None].expand(*logits.shape[:-3], 1, *logits.shape[-2:])).squeeze(-3)
        if after is None:
            index = _pick(_sharpen(chosen, temperature).softmax(-1), u[..., : self.groups, None])
        else:
            drawn: list[Tensor] = []
            for j in range(self.groups):
                given = chosen[..., j, :] + after(j, drawn[-1]) if j else chosen[..., j, :]
                drawn.append(_pick(_sharpen(given, temperature).softmax(-1), u[..., j : j + 1]))
            index = torch.stack(drawn, -1)
        return self.patterns[index].flatten(-2)[..., : self.bits]


def _sharpen(logits: Tensor, temperature: float) -> Tensor:
    return logits / max(temperature, 1e-4)


def _pick(probabilities: Tensor, u: Tensor) -> Tensor:
    """Index drawn by inverting the cumulative distribution over the last dimension; u [..., 1]."""
    cumulative = probabilities.cumsum(-1)
    index = (cumulative < u * cumulative[..., -1:]).sum(-1)
    return index.clamp_max(probabilities.shape[-1] - 1)
