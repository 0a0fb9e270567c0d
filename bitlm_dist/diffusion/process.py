"""The forward process A_t = (1-t)·A0 + t·eps, and the distributions of t (paper, section 3.3).

t = 0 is clean, t = 1 is pure noise.

Legend: N blocks (any leading shape), M tokens per block, K bits, A noise samples.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitlm_dist.compilation import compiled_region
from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import NoiseKey

TIME_FLOOR = 1e-2  # t is clamped here wherever it is a divisor
# logit-normal distribution of 1 - t, from BitDance
LOGIT_MEAN = -0.8
LOGIT_SIGMA = 0.8


def add_noise(clean: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Compute A_t from clean bits [N, M, K], eps of the same shape, and t [N, M]."""
    t = t.unsqueeze(-1)
    return (1 - t) * clean + t * eps


@compiled_region
def half_channel_logits(noisy: Tensor, t: Tensor) -> Tensor:
    """Compute lambda = (1-t)·A_t/t^2 [N, M, K].

    Given A_t alone, the log-odds of a bit being +1 are 2·lambda.
    """
    t = t.clamp_min(TIME_FLOOR).unsqueeze(-1)
    return (1 - t) * noisy / t.square()


def logit_normal_time(normal: Tensor, sigma: float = LOGIT_SIGMA) -> Tensor:
    """Map standard normal numbers n to t, with 1 - t = sigmoid(-0.8 + sigma·n)."""
    # fp64: on a CPU, the last bit of an fp32 sigmoid depends on the position of the element in the
    # tensor, and so on the microbatch
    return (1 / (1 + torch.exp(LOGIT_MEAN + sigma * normal.double()))).float()


def time_density(t: Tensor, time_distribution: str) -> Tensor:
    """Density of t under ``uniform`` or ``logit_normal``."""
    if time_distribution == "uniform":
        return torch.ones_like(t)
    n = (torch.logit(1 - t) - LOGIT_MEAN) / LOGIT_SIGMA
    return torch.exp(-0.5 * n.square()) / ((2 * torch.pi) ** 0.5 * LOGIT_SIGMA * t * (1 - t))


@dataclass(frozen=True)
class NoiseDistribution:
    """Distribution of the training noise; the fields are those of the config's ``diffusion``."""

    time_distribution: str = "uniform"  # "uniform" (paper) or "logit_normal"
    num_noise_samples: int = 1
    per_token_noise_prob: float = 0.0  # fraction of blocks whose tokens have their own noise levels
    per_token_noise_sigma: float = 1.5
    context_dropout: float = 0.0  # probability of replacing a block's context by the null embedding


class Noise(NamedTuple):
    """The noise of a training step, A samples of it.

    Attributes:
        eps: [A, N, M, K].
        t: [A, N, M].
        keep_mask: [N], False where the context is dropped.
    """

    eps: Tensor
    t: Tensor
    keep_mask: Tensor


def sample_training_noise(
    distribution: NoiseDistribution, shape: tuple[int, int], noise_key: NoiseKey
) -> Noise:
    """Sample the noise of a training step, a pure function of the arguments.

    The context is dropped per block and not per noise sample, because the head reads the hidden
    states once per step.

    Args:
        shape: (M, K) of the blocks.
    """
    num_tokens, num_bits = shape
    eps = []
    times = []
    choices = []

    for noise_sample_index in range(distribution.num_noise_samples):
        sample_key = noise_key.replace(noise_sample_index=noise_sample_index)
        eps.append(
            sample_key.normal(noise.NOISE_STREAM, num_tokens * num_bits).unflatten(-1, shape)
        )
        u = sample_key.uniform(noise.CHOICE_STREAM, 3)
        n = sample_key.normal(noise.TIME_STREAM, 1 + num_tokens)

        # One time for the whole block, ...
        block_t = (
            u[..., 2]
            if distribution.time_distribution == "uniform"
            else logit_normal_time(n[..., 0])
        )
        t = block_t.unsqueeze(-1).expand(*block_t.shape, num_tokens)

        # ... or for a random fraction of the blocks, one per token.
        if distribution.per_token_noise_prob > 0:
            per_token_t = logit_normal_time(n[..., 1:], distribution.per_token_noise_sigma)
            t = torch.where(
                (u[..., 0] < distribution.per_token_noise_prob).unsqueeze(-1), per_token_t, t
            )
        times.append(t)
        choices.append(u[..., 1])

    return Noise(torch.stack(eps), torch.stack(times), choices[0] >= distribution.context_dropout)


def sample_noisy(
    distribution: NoiseDistribution, clean: Tensor, noise_key: NoiseKey
) -> tuple[Tensor, Tensor, Tensor]:
    """Add training noise to clean bits [N, M, K].

    Returns:
        A_t [A, N, M, K], and ``t`` and ``keep_mask`` of :class:`Noise`.
    """
    return _sample_noisy(
        clean,
        noise_key.sequence_index,
        noise_key.block_index,
        noise_key.seed,
        noise_key.step,
        distribution,
    )


@compiled_region
def _sample_noisy(
    clean: Tensor,
    sequence_index: Tensor,
    block_index: Tensor,
    seed: int,
    step: int,
    distribution: NoiseDistribution,
) -> tuple[Tensor, Tensor, Tensor]:
    sampled = sample_training_noise(
        distribution,
        (clean.shape[-2], clean.shape[-1]),
        NoiseKey(seed, sequence_index, block_index, step),
    )
    return add_noise(clean, sampled.eps, sampled.t), sampled.t, sampled.keep_mask
