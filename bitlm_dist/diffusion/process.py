"""The forward process A_t = (1-t)·A0 + t·eps, t = 0 clean, t = 1 pure noise, and the laws of t (paper, section 3.3).

Legend: N blocks (any leading shape), M tokens a block, K bits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitlm_dist.compilation import region
from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import Source

TIME_FLOOR = 1e-2  # t is clamped here wherever something is divided by it
LOGIT_MEAN, LOGIT_SIGMA = -0.8, 0.8  # logit-normal law of 1 - t, from BitDance


def add_noise(clean: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """A_t from clean bits [N, M, K], eps of the same shape and t [N, M]."""
    t = t.unsqueeze(-1)
    return (1 - t) * clean + t * eps


@region
def channel_field(noisy: Tensor, t: Tensor) -> Tensor:
    """lambda = (1-t)·A_t/t^2 [N, M, K]: given A_t alone, the log-odds of a bit being +1 are 2·lambda."""
    t = t.clamp_min(TIME_FLOOR).unsqueeze(-1)
    return (1 - t) * noisy / t.square()


def logit_normal(normal: Tensor, sigma: float = LOGIT_SIGMA) -> Tensor:
    """t with 1 - t = sigmoid(-0.8 + sigma·n) from standard normal numbers n."""
    # fp64: on a CPU the last bit of an fp32 sigmoid depends on an element's place in the tensor, so on the microbatch
    return (1 / (1 + torch.exp(LOGIT_MEAN + sigma * normal.double()))).float()


def time_density(t: Tensor, law: str) -> Tensor:
    """Density of t under ``uniform`` or ``logit_normal``."""
    if law == "uniform":
        return torch.ones_like(t)
    n = (torch.logit(1 - t) - LOGIT_MEAN) / LOGIT_SIGMA
    return torch.exp(-0.5 * n.square()) / ((2 * torch.pi) ** 0.5 * LOGIT_SIGMA * t * (1 - t))


@dataclass(frozen=True)
class NoiseLaw:
    """How the noise of training is drawn; the fields are those of the ``diffusion`` section of the config."""

    time: str = "uniform"  # "uniform" (paper) or "logit_normal"
    draws: int = 1
    per_token: float = 0.0  # share of blocks in which each token has its own noise level
    per_token_sigma: float = 1.5
    context_dropout: float = 0.0  # probability that a block's context is replaced by the learned null state


class Noise(NamedTuple):
    """The noise of a training step: eps [A, N, M, K], t [A, N, M] of A draws; keep [N], False where the context is dropped."""

    eps: Tensor
    t: Tensor
    keep: Tensor


def training_noise(law: NoiseLaw, shape: tuple[int, int], source: Source) -> Noise:
    """The noise of a training step for blocks of ``shape`` (M, K), a pure function of its arguments (method, section 5).

    The context is dropped per block, not per draw: the backbone's states are read once.
    """
    tokens, bits = shape
    eps, times, choices = [], [], []
    for number in range(law.draws):
        drawn = source.at(draw=number)
        eps.append(drawn.normals(noise.NOISE, tokens * bits).unflatten(-1, shape))
        u = drawn.uniforms(noise.CHOICES, 3)
        n = drawn.normals(noise.TIME, 1 + tokens)
        shared = u[..., 2] if law.time == "uniform" else logit_normal(n[..., 0])
        t = shared.unsqueeze(-1).expand(*shared.shape, tokens)
        if law.per_token > 0:
            own = logit_normal(n[..., 1:], law.per_token_sigma)
            t = torch.where((u[..., 0] < law.per_token).unsqueeze(-1), own, t)
        times.append(t)
        choices.append(u[..., 1])
    return Noise(torch.stack(eps), torch.stack(times), choices[0] >= law.context_dropout)


def noised(law: NoiseLaw, clean: Tensor, source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """Clean bits [N, M, K] -> A_t [A, N, M, K], t and keep of :func:`training_noise`."""
    return _noised(clean, source.sample, source.block, source.seed, source.step, law)


@region
def _noised(
    clean: Tensor, sample: Tensor, block: Tensor, seed: int, step: int, law: NoiseLaw
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    drawn = training_noise(law, (clean.shape[-2], clean.shape[-1]), Source(seed, sample, block, step))
    return add_noise(clean, drawn.eps, drawn.t), drawn.t, drawn.keep
