"""Sharded tensors: local slices with global offsets, from which any layout can reassemble them.

A rank rarely holds full tensors: tensor parallelism gives it rows or columns, ZeRO and Megatron's
distributed optimizer give it a range of the flattened elements. Each of these is a few rectangles
of the full tensor, all of them views of the rank's memory. So describing a checkpoint needs neither
a gather nor a copy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """A rectangular slice of a full tensor."""

    offsets: tuple[int, ...]  # global index of its first element, one per dimension
    tensor: Tensor


@dataclass(frozen=True)
class ShardedTensor:
    """The slices of a tensor that this rank holds.

    Args:
        shape: shape of the full tensor.
        dtype: dtype of the full tensor.
        shards: views of this rank's memory, which must not overlap; there may be none.
    """

    shape: torch.Size
    dtype: torch.dtype
    shards: Sequence[Shard]

    @classmethod
    def from_full(cls, tensor: Tensor) -> "ShardedTensor":
        """Wrap a tensor that this rank holds in full."""
        return cls(tensor.shape, tensor.dtype, [Shard((0,) * tensor.dim(), tensor.detach())])

    @classmethod
    def from_flat_range(cls, shape: torch.Size, first: int, flat: Tensor) -> "ShardedTensor":
        """Wrap a range of a flattened tensor, as at most two rectangles per dimension.

        Args:
            shape: shape of the full tensor.
            first: index of the range's first element in the flattened tensor.
            flat: the elements of the range, [N].
        """
        flat = flat.detach()
        return cls(
            shape, flat.dtype, list(_rectangles(tuple(shape), first, flat, ())) if len(flat) else []
        )

    @property
    def full(self) -> Tensor:
        """The full tensor, which this rank must hold."""
        (only,) = self.shards
        assert only.tensor.shape == self.shape
        return only.tensor

    def to(self, dtype: torch.dtype) -> "ShardedTensor":
        """Convert to a dtype; the shards stay views if it does not change."""
        return ShardedTensor(
            self.shape, dtype, [replace(s, tensor=s.tensor.to(dtype)) for s in self.shards]
        )

    def slice_rows(self, first: int, last: int) -> "ShardedTensor":
        """This rank's shards of rows ``first`` to ``last`` - 1, as a tensor of those rows."""
        kept = []
        for shard in self.shards:
            begin = max(first, shard.offsets[0])
            end = min(last, shard.offsets[0] + len(shard.tensor))
            if begin < end:
                rows = shard.tensor[begin - shard.offsets[0] : end - shard.offsets[0]]
                kept.append(Shard((begin - first, *shard.offsets[1:]), rows))

        return ShardedTensor(torch.Size((last - first, *self.shape[1:])), self.dtype, kept)

    def as_shard_of(self, dim: int, index: int, num_shards: int) -> "ShardedTensor":
        """Reinterpret this tensor as one of the equal shards of a larger tensor.

        Args:
            dim: the dimension along which the larger tensor is split.
            index: index of this shard.
            num_shards: number of shards.
        """
        size = self.shape[dim]
        shape = torch.Size(n * num_shards if i == dim else n for i, n in enumerate(self.shape))

        def moved(offsets: tuple[int, ...]) -> tuple[int, ...]:
            """Convert offsets in this shard to offsets in the larger tensor."""
            return tuple(n + index * size if i == dim else n for i, n in enumerate(offsets))

        return ShardedTensor(
            shape, self.dtype, [replace(s, offsets=moved(s.offsets)) for s in self.shards]
        )


def _rectangles(
    shape: tuple[int, ...], first: int, flat: Tensor, outer_offsets: tuple[int, ...]
) -> Iterator[Shard]:
    """Split a range of a flattened tensor into rectangles, recursively over its dimensions.

    A range is the end of a row, then full rows, then the beginning of a row; any may be missing. A
    row is a slice of the first dimension.

    Args:
        shape: shape of the tensor before it was flattened.
        first: index of the range's first element in the flattened tensor.
        flat: the elements of the range, [N].
        outer_offsets: indices along the outer dimensions, in which the rectangles have size 1.
    """
    ones = (1,) * len(outer_offsets)
    if len(shape) <= 1:
        yield Shard(
            (*outer_offsets, *([first] if shape else [])), flat.view((*ones, -1) if shape else ones)
        )
        return

    # the end of the row in which the range starts
    row_numel = prod(shape[1:])
    row, inside = divmod(first, row_numel)
    if inside:
        end = flat[: row_numel - inside]
        flat = flat[row_numel - inside :]
        yield from _rectangles(shape[1:], inside, end, (*outer_offsets, row))
        row += 1

    rows = len(flat) // row_numel
    if rows:
        start = (*outer_offsets, row, *((0,) * (len(shape) - 1)))
        yield Shard(start, flat[: rows * row_numel].view((*ones, rows, *shape[1:])))

    # the beginning of the row in which the range ends
    if len(flat) > rows * row_numel:
        yield from _rectangles(shape[1:], 0, flat[rows * row_numel :], (*outer_offsets, row + rows))
