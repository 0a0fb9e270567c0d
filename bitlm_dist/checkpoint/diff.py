"""Compare two checkpoints element by element, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitlm_dist.checkpoint.steps import read_train_state
from bitlm_dist.checkpoint.tensors import TensorIndex, load_shards, read_index
from bitlm_dist.config_loading import flatten
from bitlm_dist.parallel.sharded_tensor import Shard, ShardedTensor
from bitlm_dist.renamed_keys import with_current_keys

BLOCK_NUMEL = 2**24  # elements of each side in memory at once
WEIGHT_PREFIX = "model."


@dataclass(frozen=True)
class Difference:
    """A tensor that differs between two checkpoints.

    Args:
        name: The tensor's name.
        largest: Largest absolute difference of an element; infinite if one side lacks the tensor or
            has another shape.
        relative: Norm of the difference divided by the norm of the first side.
        note: Why the elements could not be compared; empty if they were.
    """

    name: str
    largest: float
    relative: float
    note: str = ""

    @property
    def slot(self) -> str:
        """``weights``, or the optimizer state's slot."""
        return slot_of(self.name)


def slot_of(name: str) -> str:
    """``weights`` for a weight, or the slot of a tensor of the optimizer state."""
    return "weights" if name.startswith(WEIGHT_PREFIX) else name.rpartition(".")[2]


def compare_tensors(first: Path, second: Path) -> tuple[dict[str, int], list[Difference]]:
    """Compare the tensors of two checkpoints.

    Returns:
        The number of tensors per slot, and the tensors that differ, the most different first.
    """
    indices = read_index(first), read_index(second)
    differences = []
    num_per_slot = dict[str, int]()

    for name in sorted(indices[0].keys() | indices[1].keys()):
        num_per_slot[slot_of(name)] = num_per_slot.get(slot_of(name), 0) + 1
        sides = [index.get(name) for index in indices]
        difference = _compare_tensor(name, (first, second), sides[0], sides[1])
        if difference.largest > 0:
            differences.append(difference)

    return num_per_slot, sorted(differences, key=lambda d: -d.relative)


def _compare_tensor(
    name: str, folders: tuple[Path, Path], a: TensorIndex | None, b: TensorIndex | None
) -> Difference:
    if a is None or b is None:
        return Difference(name, inf, inf, f"only in the {'second' if a is None else 'first'}")
    if a.shape != b.shape:
        return Difference(name, inf, inf, f"shape {tuple(a.shape)} and {tuple(b.shape)}")

    largest = difference_squared = norm_squared = 0.0
    for blocks in zip(_blocks(name, folders[0], a), _blocks(name, folders[1], b), strict=True):
        x, y = (block.double() for block in blocks)
        # The same infinity or NaN on both sides is no difference; NaN on one side, an infinite one.
        difference = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, x - y).nan_to_num(
            nan=inf, posinf=inf, neginf=-inf
        )
        largest = max(largest, float(difference.abs().max()) if difference.numel() else 0.0)
        difference_squared += float(difference.square().sum())
        norm_squared += float(x.square().sum())

    relative = sqrt(difference_squared / norm_squared) if norm_squared else inf
    # Infinite norms would divide to NaN, by which nothing can be sorted.
    return Difference(
        name,
        largest,
        (0.0 if difference_squared == 0 else relative)
        if isfinite(norm_squared) and isfinite(difference_squared)
        else inf,
    )


def _blocks(name: str, folder: Path, stored: TensorIndex) -> Iterator[Tensor]:
    """Yield a tensor in blocks of full rows, about :data:`BLOCK_NUMEL` elements each."""
    shape = stored.shape
    if not shape:
        scalar = torch.empty((), dtype=stored.dtype)
        load_shards(folder, {name: ShardedTensor.from_full(scalar)}, {name: stored})
        yield scalar
        return

    rows = max(1, BLOCK_NUMEL // max(1, prod(shape[1:])))
    for row in range(0, shape[0], rows):
        block = torch.empty((min(rows, shape[0] - row), *shape[1:]), dtype=stored.dtype)
        shard = Shard((row, *(0 for _ in shape[1:])), block)
        load_shards(folder, {name: ShardedTensor(shape, stored.dtype, [shard])}, {name: stored})
        yield block


def compare_train_states(first: Path, second: Path) -> dict[str, tuple[Any, Any]]:
    """Compare step, data position, fingerprint and config of two checkpoints.

    Time spent and versions are left out.

    Returns:
        Both values of every key that differs.
    """
    states = [read_train_state(folder) for folder in (first, second)]
    flat = [
        {
            **{key: state.get(key) for key in ("step", "tokens", "next_sequence")},
            **dict(flatten(state.get("fingerprint", {}))),
            # A key that was renamed or removed between the two is no difference.
            **with_current_keys(dict(flatten(state.get("config", {})))),
        }
        for state in states
    ]

    keys = sorted(flat[0].keys() | flat[1].keys())
    return {
        key: (flat[0].get(key), flat[1].get(key))
        for key in keys
        if flat[0].get(key) != flat[1].get(key)
    }
