"""The terms of the head's loss, by position in the block and by noise level, as one small tensor.

Legend: N target blocks, M tokens per block.
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from bitlm_dist.model.config import Term

TERMS: tuple[str, ...] = get_args(Term)
NUM_NOISE_LEVELS = 8  # bins of equal width in t, from clean (0) to pure noise (1)


def num_packed(block_size: int) -> int:
    """Number of elements of :func:`pack_terms` for blocks of M tokens."""
    return 2 * len(TERMS) * block_size + 2 * NUM_NOISE_LEVELS


def pack_terms(by_position: Mapping[str, Tensor], by_noise_level: Tensor) -> Tensor:
    """Pack sums of unweighted losses, in nats per bit, and the numbers of tokens.

    The results of several microbatches or ranks add up.

    Args:
        by_position: of each term that the model has, [2, M]: sum and count by the position of the
            predicted token in its block.
        by_noise_level: of the denoising loss, [2, 8]: sum and count by noise level.

    Returns:
        A vector of :func:`num_packed` elements.
    """
    absent = torch.zeros_like(by_position["denoising"])
    return torch.cat([*(by_position.get(term, absent) for term in TERMS), by_noise_level], 1).view(
        -1
    )


def loss_term_metrics(packed: Sequence[float]) -> dict[str, Any]:
    """Means by their names in metrics.jsonl, of the terms that the model has.

    Args:
        packed: elements of :func:`pack_terms`, summed over the step; none for a softmax.

    Returns:
        The mean of each term, and lists by position and noise level, in which None stands for a
        position or noise level without any token.
    """
    if not packed:
        return {}

    half = len(packed) // 2
    sums = packed[:half]
    counts = packed[half:]
    block_size = (half - NUM_NOISE_LEVELS) // len(TERMS)
    metrics: dict[str, Any] = {}
    for number, term in enumerate(TERMS):
        positions = slice(number * block_size, (number + 1) * block_size)
        if any(counts[positions]):
            metrics[f"loss_{term}"] = sum(sums[positions]) / sum(counts[positions])
            metrics[f"loss_{term}_by_position"] = _means(sums[positions], counts[positions])

    levels = slice(half - NUM_NOISE_LEVELS, half)
    metrics["loss_denoising_by_noise_level"] = _means(sums[levels], counts[levels])
    return metrics


def _means(sums: Sequence[float], counts: Sequence[float]) -> list[float | None]:
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


@torch.no_grad()
def sum_by_position(loss: Tensor, valid: Tensor) -> Tensor:
    """Sum and count, [2, M], of a loss [N, M] where ``valid`` [N, M]."""
    return torch.stack(((loss * valid).sum(0), valid.sum(0)))


@torch.no_grad()
def sum_by_bin(loss: Tensor, bin_index: Tensor, valid: Tensor, num_bins: int) -> Tensor:
    """Sum and count per bin, [2, num_bins], of a loss of any shape where ``valid``.

    The order of summation is fixed, unlike that of atomic additions, and a loss that is not finite
    stays in its bin.
    """
    bins = torch.arange(num_bins, device=loss.device).unsqueeze(1)
    is_in_bin = (bin_index.flatten() == bins) & valid.expand(loss.shape).flatten()
    return torch.stack((torch.where(is_in_bin, loss.flatten(), 0).sum(1), is_in_bin.sum(1)))


def noise_level_bin(t: Tensor) -> Tensor:
    """The bin of each time."""
    return (t * NUM_NOISE_LEVELS).long().clamp_max(NUM_NOISE_LEVELS - 1)
