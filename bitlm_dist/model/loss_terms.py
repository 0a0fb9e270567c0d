"""The terms of the head's loss, by position in the block and by noise level, as one small tensor.

Legend: N target blocks, M tokens per block, A noise samples, T states whose next token carries
loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TERMS = ("denoising", "context", "autoregressive", "next_token")
NUM_NOISE_LEVELS = 8  # bins of equal width in t, from clean (0) to pure noise (1)


def num_packed(block_size: int) -> int:
    """Number of elements of :meth:`LossTerms.pack` for blocks of M tokens."""
    return 2 * len(TERMS) * block_size + 2 * NUM_NOISE_LEVELS


@dataclass(frozen=True)
class LossTerms:
    """Sums of each term over tokens, unweighted, in nats per bit, and the numbers of tokens.

    Those of several microbatches or ranks add up.
    """

    by_position: Tensor  # [4, 2, M], sum and count by position of the predicted token in its block
    by_noise_level: Tensor  # [2, 8], sum and count of the denoising loss

    @classmethod
    def of(cls, by_position: Mapping[str, Tensor], by_noise_level: Tensor) -> "LossTerms":
        """From the sums and counts [2, M] of the terms that a model has."""
        absent = torch.zeros_like(by_position["denoising"])
        return cls(torch.stack([by_position.get(term, absent) for term in TERMS]), by_noise_level)

    def pack(self) -> Tensor:
        """All of them as one vector [8·M + 16]."""
        return torch.cat((self.by_position.flatten(), self.by_noise_level.flatten()))


def loss_term_metrics(packed: Sequence[float]) -> dict[str, Any]:
    """Means by their names in metrics.jsonl, of the terms that the model has.

    Args:
        packed: elements of :meth:`LossTerms.pack`, summed over the step; none for a softmax.

    Returns:
        The mean of each term, and lists by position and noise level, where None stands for a
        position or noise level without any token.
    """
    if not packed:
        return {}

    metrics: dict[str, Any] = {}
    *by_position, noise_sums, noise_counts = _split(packed)
    for number, term in enumerate(TERMS):
        sums, counts = by_position[2 * number : 2 * number + 2]
        if any(counts):
            metrics[f"loss_{term}"] = sum(sums) / sum(counts)
            metrics[f"loss_{term}_by_position"] = _means(sums, counts)

    metrics["loss_denoising_by_noise_level"] = _means(noise_sums, noise_counts)
    return metrics


def _split(packed: Sequence[float]) -> list[Sequence[float]]:
    """Split into sums and counts of each term, then those of the noise levels."""
    num_by_position = len(packed) - 2 * NUM_NOISE_LEVELS
    block_size = num_by_position // (2 * len(TERMS))
    starts = [*range(0, num_by_position, block_size), num_by_position, len(packed) - NUM_NOISE_LEVELS]
    return [packed[a:b] for a, b in zip(starts, [*starts[1:], len(packed)], strict=True)]


def _means(sums: Sequence[float], counts: Sequence[float]) -> list[float | None]:
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


@torch.no_grad()
def sum_by_position(loss: Tensor, valid: Tensor) -> Tensor:
    """Sum and count, [2, M], of a loss [N, M] where ``valid`` [N, M]."""
    return torch.stack(((loss * valid).sum(0), valid.sum(0)))


@torch.no_grad()
def sum_by_bin(loss: Tensor, bin_index: Tensor, valid: Tensor, num_bins: int) -> Tensor:
    """Sum and count per bin, [2, num_bins], of a loss of any shape where ``valid``.

    A product with one-hot rows, whose order of summation is fixed, unlike that of atomic additions.
    """
    weights = valid.expand(loss.shape).flatten().float()
    bins = torch.arange(num_bins, device=loss.device)
    one_hot = (bin_index.flatten().unsqueeze(-1) == bins).float()
    return torch.stack((loss.flatten() * weights, weights)) @ one_hot


def noise_level_bin(t: Tensor) -> Tensor:
    """The bin of each time."""
    return (t * NUM_NOISE_LEVELS).long().clamp_max(NUM_NOISE_LEVELS - 1)
