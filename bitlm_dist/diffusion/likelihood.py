"""How many nats a block costs: the bound of the diffusion head, and the exact chain rule of a head with per-token noise.

With g = (1-t)/t (the square root of the signal-to-noise ratio), the I-MMSE identity reads
-log p(A0 | C) <= ∫ g · E||A0 - A0_hat||^2 dg, with equality for the exact denoiser. The integral runs to ``G_MAX``; the rest is
what decoding each bit from its own channel at ``G_MAX`` costs.

Legend: N blocks, M tokens a block, K bits, S strata.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import Source
from bitlm_dist.diffusion.outputs import Output
from bitlm_dist.diffusion.process import add_noise
from bitlm_dist.diffusion.sampler import Denoisers, sign

G_MAX = 5.0


@dataclass(frozen=True)
class Bound:
    """Upper bound of -log p in nats, by token [N, M]; ``accuracy`` [S] is the share of right bits by stratum of g, low to high."""

    nats: Tensor
    accuracy: Tensor


def reconstruction_nats(g: float = G_MAX) -> float:
    """E[-log p(bit | its channel at g)] in nats, by Gauss-Hermite quadrature; 2e-7 at g = 5."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    log_odds = torch.from_numpy(2 * (g * g + g * nodes))
    return float((F.softplus(-log_odds) * torch.from_numpy(weights)).sum() / math.sqrt(2 * math.pi))


def strata_times(strata: int) -> Tensor:
    """t at the middle of each stratum of g in (0, G_MAX), [S] from noisy to clean."""
    return 1 / (1 + G_MAX * (torch.arange(strata) + 0.5) / strata)


def bound(denoisers: Denoisers, clean: Tensor, *, strata: int, source: Source, valid: Tensor) -> Bound:
    """Monte-Carlo estimate of the bound, unbiased: one jittered g in every stratum, for every block (method, section 7).

    Args:
        denoisers: the head given its context, see :mod:`~bitlm_dist.diffusion.sampler`.
        clean: bits [N, M, K].
        strata: S, at least 1; head passes.
        source: of the noise.
        valid: [N, M] bool, the tokens that ``accuracy`` counts.
    """
    nats = torch.full(clean.shape[:-1], reconstruction_nats() * clean.shape[-1], device=clean.device)
    accuracy = []
    for stratum in range(strata):
        drawn = source.at(step=stratum)
        g = (stratum + drawn.uniforms(noise.TIME, 1)) * (G_MAX / strata)
        eps = drawn.normals(noise.NOISE, clean[0].numel()).view(clean.shape)
        t = 1 / (1 + g)  # [N, 1]
        (denoise,) = denoisers(t.unsqueeze(0))
        denoised = denoise(add_noise(clean, eps, t))
        nats = nats + G_MAX / strata * g * (clean - denoised).square().sum(-1)
        accuracy.append((sign(denoised) == clean).float().mean(-1)[valid].mean())
    return Bound(nats, torch.stack(accuracy))


def chain_nats(raw: Callable[[Tensor, Tensor], Tensor], output: Output, clean: Tensor, source: Source) -> Tensor:
    """-log p of each token given the ones before it in its block and the context, [N, M] nats, M head passes.

    Tokens before are clean, the token itself and those after it pure noise: exact for a head trained with per-token noise (method,
    section 9), given the noise that stands in the open places.
    """
    tokens = clean.shape[-2]
    eps = source.normals(noise.NOISE, clean[0].numel()).view(clean.shape)
    nats = []
    for i in range(tokens):
        open_ = torch.arange(tokens, device=clean.device) >= i
        state = torch.where(open_.unsqueeze(-1), eps, clean)
        nats.append(-output.log_prob(raw(state, open_.float().expand(clean.shape[:-1])), clean)[..., i])
    return torch.stack(nats, -1)
