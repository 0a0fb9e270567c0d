"""Output distributions: the clean bits given the noisy ones, parametrized by the head's raw output.

Two distributions share one interface. :class:`BitOutput` predicts the bits themselves (paper,
Eq. 12). :class:`MixtureOutput` has, for each token, a mixture of products of distributions over
groups of bits.

Legend: N blocks (any leading shape), M tokens per block, K bits, R mixture components, G groups,
g bits per group, P = 2^g patterns. A0_hat is the estimate of the clean bits, o a bit's logit, and
lambda the result of :func:`~bitlm_dist.diffusion.process.half_channel_logits`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.diffusion import losses
from bitlm_dist.diffusion.mixture import (
    mixture_marginals,
    mixture_nll,
    pattern_probabilities,
    posterior_marginals,
    split_mixture_logits,
)
from bitlm_dist.diffusion.process import half_channel_logits

PosteriorFn = Callable[[Tensor], Tensor]
ConditionalLogitsFn = Callable[[int, Tensor], Tensor]


class OutputDistribution(Protocol):
    """Interface of an output distribution.

    ``logits``, the raw output, are [N, M, num_logits]; noisy and clean bits are [N, M, K]; t is
    [N, M]; ``channel_logits`` are those that :meth:`channel_logits` returns.
    """

    num_logits: int
    num_posterior_features: int

    def channel_logits(self, noisy: Tensor, t: Tensor) -> Tensor:
        """Log-likelihood of the noisy bits under each bit value or pattern, up to a constant.

        Adding it to ``logits`` gives the logits of the posterior.
        """
        ...

    def denoise(self, logits: Tensor, channel_logits: Tensor) -> Tensor:
        """A0_hat, the estimate of the clean bits [N, M, K]."""
        ...

    def loss(self, logits: Tensor, noisy: Tensor, t: Tensor, clean: Tensor) -> Tensor:
        """Training loss of each token [N, M], a mean over its bits."""
        ...

    def posterior_features(self, logits: Tensor, channel_logits: Tensor) -> Tensor:
        """The posterior as input features [N, M, num_posterior_features] of the head."""
        ...

    def posterior_fn(self, logits: Tensor) -> PosteriorFn:
        """Bind :meth:`posterior_features` to ``logits``, for use with many ``channel_logits``."""
        ...

    def log_prob(self, logits: Tensor, clean: Tensor) -> Tensor:
        """Log-probability [N, M] of the tokens' bits at pure noise, given ``logits`` alone."""
        ...

    def sample(self, logits: Tensor, u: Tensor, temperature: float) -> Tensor:
        """Sample bits [..., K] at pure noise from uniform random numbers u [..., K + 1].

        The first numbers are for bits or groups, the last one is for the mixture component.
        """
        ...


class BitOutput:
    """The raw output is A0_hat itself (paper, Eq. 12), an :class:`OutputDistribution`.

    Args:
        num_bits: K.
        loss: ``x``, ``v`` or ``elbo``.
        time_distribution: distribution of t in training; ``elbo`` divides by its density.
    """

    def __init__(self, num_bits: int, loss: str, time_distribution: str) -> None:
        self.num_logits = self.num_posterior_features = num_bits
        self.loss_type = loss
        self.time_distribution = time_distribution

    def channel_logits(self, noisy: Tensor, t: Tensor) -> Tensor:
        """Nothing: the network itself reads the noisy bits."""
        return noisy.new_zeros(())

    def denoise(self, logits: Tensor, channel_logits: Tensor) -> Tensor:
        """The raw output in fp32."""
        return logits.float()

    def loss(self, logits: Tensor, noisy: Tensor, t: Tensor, clean: Tensor) -> Tensor:
        """Loss of the configured type."""
        denoised = logits.float()
        if self.loss_type == "x":
            return losses.x_loss(clean, denoised)
        if self.loss_type == "v":
            return losses.v_loss(clean, denoised, t)
        return losses.elbo_loss(clean, denoised, t, self.time_distribution)

    def posterior_features(self, logits: Tensor, channel_logits: Tensor) -> Tensor:
        """A0_hat itself."""
        return self.denoise(logits, channel_logits)

    def posterior_fn(self, logits: Tensor) -> PosteriorFn:
        """:meth:`denoise` with ``logits`` bound."""
        return partial(self.denoise, logits)

    def log_prob(self, logits: Tensor, clean: Tensor) -> Tensor:
        """Log-probability at pure noise, where the channel adds nothing."""
        return -F.softplus(-clean * logits.float()).sum(-1)

    def sample(self, logits: Tensor, u: Tensor, temperature: float) -> Tensor:
        """Sample each bit; temperature 0 takes its more probable value."""
        return torch.where(
            u[..., :-1] < _apply_temperature(logits.float(), temperature).sigmoid(), 1.0, -1.0
        )


class MixtureOutput(nn.Module):
    """A mixture of R products over groups of g bits, an :class:`OutputDistribution`.

    The posterior given noisy bits has a closed form (diffusion/mixture.py). The raw output of a
    token has R mixture logits, then R x G x P pattern logits. If the last group is shorter than g,
    its surplus patterns are masked. With g = 1 and R = 1 each bit has a logit of its own, to which
    the channel's log-odds are added.

    Args:
        num_bits: K.
        bits_per_group: g.
        num_components: R.
    """

    patterns: Tensor  # [P, g] in {-1, +1}
    padding_mask: Tensor  # [G, P], -inf at patterns that a short last group does not have

    def __init__(self, num_bits: int, bits_per_group: int, num_components: int) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.bits_per_group = bits_per_group
        self.num_components = num_components
        self.num_groups = math.ceil(num_bits / bits_per_group)
        self.num_posterior_features = self.num_groups * 2**bits_per_group
        self.num_logits = num_components * (1 + self.num_posterior_features)

        # The missing bits of a short last group are its highest, so only its lowest patterns exist.
        pattern_index = torch.arange(2**bits_per_group)
        bit_positions = torch.arange(bits_per_group)
        num_padding_bits = self.num_groups * bits_per_group - num_bits
        padding_mask = torch.zeros(self.num_groups, 2**bits_per_group)
        padding_mask[-1, 2 ** (bits_per_group - num_padding_bits) :] = -math.inf

        self.register_buffer(
            "patterns",
            (2 * (pattern_index[:, None] >> bit_positions & 1) - 1).float(),
            persistent=False,
        )
        self.register_buffer("padding_mask", padding_mask, persistent=False)

    def channel_logits(self, noisy: Tensor, t: Tensor) -> Tensor:
        """Inner product of each group's lambda with each pattern, [N·M, G, P]."""
        return (self._group_bits(half_channel_logits(noisy, t)) @ self.patterns.T).flatten(0, -3)

    def _group_bits(self, bits: Tensor) -> Tensor:
        """Group bits [N, M, K] as [N, M, G, g], zero-padded at the end of the last group."""
        return F.pad(bits, (0, self.num_groups * self.bits_per_group - self.num_bits)).unflatten(
            -1, (self.num_groups, self.bits_per_group)
        )

    def _nll(self, logits: Tensor, clean: Tensor, channel_logits: Tensor | None) -> Tensor:
        pattern_index = self.pattern_index(clean).flatten(0, -2)
        return mixture_nll(
            logits.flatten(0, -2), channel_logits, pattern_index, self.padding_mask
        ).view(logits.shape[:-1])

    def pattern_index(self, clean: Tensor) -> Tensor:
        """Index of each group's pattern in clean bits [..., K], [..., G]."""
        powers_of_two = 2 ** torch.arange(self.bits_per_group, device=clean.device)
        return ((self._group_bits(clean) > 0) * powers_of_two).sum(-1)

    def posterior_features(self, logits: Tensor, channel_logits: Tensor) -> Tensor:
        """Posterior marginals of all patterns, [N, M, G·P], without gradient."""
        marginals = mixture_marginals(logits.flatten(0, -2), channel_logits, self.padding_mask)
        return marginals.flatten(-2).view(*logits.shape[:-1], -1)

    @torch.no_grad()
    def posterior_fn(self, logits: Tensor) -> PosteriorFn:
        """:meth:`posterior_features` with ``logits`` bound.

        It holds the pattern probabilities, which take as much memory as ``logits``.
        """
        mixture_logits, pattern_probs = pattern_probabilities(
            logits.flatten(0, -2), self.padding_mask
        )

        def posterior_features(channel_logits: Tensor) -> Tensor:
            """Posterior marginals of all patterns, [N, M, G·P]."""
            marginals = posterior_marginals(
                mixture_logits, pattern_probs, channel_logits, self.padding_mask
            )
            return marginals.flatten(-2).view(*logits.shape[:-1], -1)

        return posterior_features

    def denoise(self, logits: Tensor, channel_logits: Tensor) -> Tensor:
        """Posterior mean, bounded by construction; without gradient."""
        marginals = self.posterior_features(logits, channel_logits).unflatten(
            -1, (self.num_groups, -1)
        )
        return (marginals @ self.patterns).flatten(-2)[..., : self.num_bits]

    def loss(self, logits: Tensor, noisy: Tensor, t: Tensor, clean: Tensor) -> Tensor:
        """-log posterior of the clean token, in nats per bit."""
        return self._nll(logits, clean, self.channel_logits(noisy, t)) / self.num_bits

    def log_prob(self, logits: Tensor, clean: Tensor) -> Tensor:
        """Log-probability at pure noise."""
        return -self._nll(logits, clean, None)

    def sample(
        self,
        logits: Tensor,
        u: Tensor,
        temperature: float,
        conditional_logits_fn: ConditionalLogitsFn | None = None,
    ) -> Tensor:
        """Sample a component, then each of its groups.

        Args:
            logits: [..., num_logits].
            u: uniform random numbers [..., K + 1].
            temperature: divides all logits; 0 takes the most probable choice.
            conditional_logits_fn: maps (j, patterns [...] of group j - 1) to the correction
                [..., P] of the logits of group j, the same for all components.

        Returns:
            Bits [..., K].
        """
        mixture_logits, pattern_logits = split_mixture_logits(
            logits, self.num_components, self.padding_mask
        )
        component = _sample_categorical(
            _apply_temperature(mixture_logits, temperature).softmax(-1), u[..., -1:]
        )
        # the logits of the sampled component only, [..., G, P]
        group_logits = pattern_logits.gather(
            -3,
            component[..., None, None, None].expand(
                *pattern_logits.shape[:-3], 1, *pattern_logits.shape[-2:]
            ),
        ).squeeze(-3)

        # Given the component, the groups are independent, except for the correction.
        if conditional_logits_fn is None:
            pattern_index = _sample_categorical(
                _apply_temperature(group_logits, temperature).softmax(-1),
                u[..., : self.num_groups, None],
            )
        else:
            pattern_index = self._sample_groups_in_order(
                group_logits, u, temperature, conditional_logits_fn
            )
        return self.patterns[pattern_index].flatten(-2)[..., : self.num_bits]

    def _sample_groups_in_order(
        self,
        group_logits: Tensor,
        u: Tensor,
        temperature: float,
        conditional_logits_fn: ConditionalLogitsFn,
    ) -> Tensor:
        """Sample patterns [..., G] from logits [..., G, P], each given the previous one."""
        sampled_patterns: list[Tensor] = []
        for group_index in range(self.num_groups):
            conditional_logits = (
                group_logits[..., group_index, :]
                + conditional_logits_fn(group_index, sampled_patterns[-1])
                if group_index
                else group_logits[..., group_index, :]
            )
            sampled_patterns.append(
                _sample_categorical(
                    _apply_temperature(conditional_logits, temperature).softmax(-1),
                    u[..., group_index : group_index + 1],
                )
            )
        return torch.stack(sampled_patterns, -1)


def _apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    # at this floor the softmax is one-hot, so temperature 0 takes the argmax
    return logits / max(temperature, 1e-4)


def _sample_categorical(probabilities: Tensor, u: Tensor) -> Tensor:
    """Sample an index by inverting the cumulative distribution over the last dimension.

    Args:
        u: uniform random numbers [..., 1].
    """
    # rounding errors can make the last sum differ from 1, so u is scaled by it
    cumulative = probabilities.cumsum(-1)
    index = (cumulative < u * cumulative[..., -1:]).sum(-1)
    return index.clamp_max(probabilities.shape[-1] - 1)
