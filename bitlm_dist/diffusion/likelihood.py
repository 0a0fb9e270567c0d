"""Nats per block: the bound of the diffusion head, and the exact chain rule (per-token noise).

With g = (1-t)/t (the square root of the signal-to-noise ratio), the I-MMSE identity reads
-log p(A0 | C) <= ∫ g · E||A0 - A0_hat||^2 dg, with equality for the exact denoiser. The integral
runs to ``G_MAX``; the remainder is the cost of decoding each bit from its own channel at ``G_MAX``.

Legend: N blocks, M tokens per block, K bits, S strata.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import NoiseKey
from bitlm_dist.diffusion.outputs import OutputDistribution
from bitlm_dist.diffusion.process import add_noise
from bitlm_dist.diffusion.sampler import Denoisers, sign

G_MAX = 5.0


@dataclass(frozen=True)
class NelboEstimate:
    """An estimated upper bound of -log p.

    Attributes:
        nelbo: nats of each token, [N, M].
        bit_accuracy: fraction of correct bits in each stratum of g, from low to high, [S].
    """

    nelbo: Tensor
    bit_accuracy: Tensor


def reconstruction_nll(g: float = G_MAX) -> float:
    """Compute E[-log p(bit | its channel at g)] in nats by Gauss-Hermite quadrature.

    It is 2e-7 at g = 5.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    log_odds = torch.from_numpy(2 * (g * g + g * nodes))
    return float((F.softplus(-log_odds) * torch.from_numpy(weights)).sum() / math.sqrt(2 * math.pi))


def noise_level_times(num_noise_levels: int) -> Tensor:
    """t at the middle of each stratum of g in (0, G_MAX), [S] from noisy to clean."""
    return 1 / (1 + G_MAX * (torch.arange(num_noise_levels) + 0.5) / num_noise_levels)


def estimate_nelbo(
    denoisers: Denoisers,
    clean: Tensor,
    *,
    num_noise_levels: int,
    noise_key: NoiseKey,
    valid: Tensor,
) -> NelboEstimate:
    """Estimate the bound by Monte Carlo, without bias.

    Each block gets one jittered g in every stratum.

    Args:
        denoisers: the head given its context, see :mod:`~bitlm_dist.diffusion.sampler`.
        clean: bits [N, M, K].
        num_noise_levels: S, at least 1; one head pass per noise level.
        noise_key: key of the noise.
        valid: [N, M] bool, the tokens that ``bit_accuracy`` counts.
    """
    nelbo = torch.full(
        clean.shape[:-1], reconstruction_nll() * clean.shape[-1], device=clean.device
    )
    bit_accuracy = []

    for noise_level in range(num_noise_levels):
        # one g per block, uniform within the stratum
        level_key = noise_key.replace(step=noise_level)
        g = (noise_level + level_key.uniform(noise.TIME_STREAM, 1)) * (G_MAX / num_noise_levels)
        eps = level_key.normal(noise.NOISE_STREAM, clean[0].numel()).view(clean.shape)
        t = 1 / (1 + g)  # [N, 1]

        (denoise,) = denoisers(t.unsqueeze(0))
        denoised = denoise(add_noise(clean, eps, t))

        nelbo = nelbo + G_MAX / num_noise_levels * g * (clean - denoised).square().sum(-1)
        bit_accuracy.append((sign(denoised) == clean).float().mean(-1)[valid].mean())

    return NelboEstimate(nelbo, torch.stack(bit_accuracy))


def autoregressive_nll(
    logits_fn: Callable[[Tensor, Tensor], Tensor],
    output: OutputDistribution,
    clean: Tensor,
    noise_key: NoiseKey,
) -> Tensor:
    """Compute -log p of each token given the context and the tokens before it in its block.

    The tokens before are clean; the token itself and those after it are pure noise. This takes M
    head passes. Given that noise, it is exact for a head trained with per-token noise (method,
    section 9).

    Args:
        logits_fn: maps noisy bits [N, M, K] and times [N, M] to the raw output.
        output: the distribution of the raw output.
        clean: bits [N, M, K].
        noise_key: key of the noise.

    Returns:
        Nats [N, M].
    """
    num_tokens = clean.shape[-2]
    eps = noise_key.normal(noise.NOISE_STREAM, clean[0].numel()).view(clean.shape)

    nll = []
    for i in range(num_tokens):
        # one pass scores one token: only the tokens before it are clean
        is_noisy = torch.arange(num_tokens, device=clean.device) >= i
        noisy = torch.where(is_noisy.unsqueeze(-1), eps, clean)
        logits = logits_fn(noisy, is_noisy.float().expand(clean.shape[:-1]))
        nll.append(-output.log_prob(logits, clean)[..., i])
    return torch.stack(nll, -1)
