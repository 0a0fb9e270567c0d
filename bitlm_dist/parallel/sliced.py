"""Parts of a whole tensor: slices with their places, which any layout can put together again.

A rank rarely holds whole tensors: tensor parallelism gives it rows or columns, ZeRO and Megatron's distributed optimizer a range of
the flattened numbers. All of these are views of a few rectangles, so a checkpoint needs neither a gather nor a copy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """A rectangle of a whole tensor: ``start`` is the place of its first number, one index a dimension, ``tensor`` its numbers."""

    start: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class Sliced:
    """What this rank holds of a tensor.

    Args:
        shape: of the whole tensor.
        dtype: of its numbers.
        slices: views of this rank's memory; they do not overlap, and there may be none.
    """

    shape: torch.Size
    dtype: torch.dtype
    slices: Sequence[Slice]

    @classmethod
    def whole(cls, tensor: Tensor) -> "Sliced":
        """All of a tensor."""
        return cls(tensor.shape, tensor.dtype, [Slice((0,) * tensor.dim(), tensor.detach())])

    @classmethod
    def of_range(cls, shape: torch.Size, first: int, flat: Tensor) -> "Sliced":
        """The numbers ``flat`` [N], from number ``first`` on of the flattened tensor: at most two slices a dimension."""
        flat = flat.detach()
        return cls(shape, flat.dtype, list(_rectangles(tuple(shape), first, flat, ())) if len(flat) else [])

    @property
    def tensor(self) -> Tensor:
        """The whole tensor, where this rank holds it."""
        (only,) = self.slices
        assert only.tensor.shape == self.shape
        return only.tensor

    def to(self, dtype: torch.dtype) -> "Sliced":
        """In another precision; the same views where it is the same."""
        return Sliced(self.shape, dtype, [replace(s, tensor=s.tensor.to(dtype)) for s in self.slices])

    def rows(self, first: int, last: int) -> "Sliced":
        """What this rank holds of rows ``first`` to ``last`` - 1, as a tensor of its own."""
        kept = []
        for part in self.slices:
            begin, end = max(first, part.start[0]), min(last, part.start[0] + len(part.tensor))
            if begin < end:
                rows = part.tensor[begin - part.start[0] : end - part.start[0]]
                kept.append(Slice((begin - first, *part.start[1:]), rows))
        return Sliced(torch.Size((last - first, *self.shape[1:])), self.dtype, kept)

    def along(self, dimension: int, number: int, count: int) -> "Sliced":
        """The same numbers as part of a tensor of which this one is share ``number`` of ``count`` along a dimension."""
        size = self.shape[dimension]
        shape = torch.Size(n * count if i == dimension else n for i, n in enumerate(self.shape))

        def moved(start: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(n + number * size if i == dimension else n for i, n in enumerate(start))

        return Sliced(shape, self.dtype, [replace(s, start=moved(s.start)) for s in self.slices])


def _rectangles(shape: tuple[int, ...], first: int, flat: Tensor, outer: tuple[int, ...]) -> Iterator[Slice]:
    """A range of a flattened tensor: the end of a row, whole rows, the beginning of one. ``outer``: place of the tensor."""
    ones = (1,) * len(outer)
    if len(shape) <= 1:
        yield Slice((*outer, *([first] if shape else [])), flat.view((*ones, -1) if shape else ones))
        return
    inner = prod(shape[1:])
    row, inside = divmod(first, inner)
    if inside:
        end, flat = flat[: inner - inside], flat[inner - inside :]
        yield from _rectangles(shape[1:], inside, end, (*outer, row))
        row += 1
    rows = len(flat) // inner
    if rows:
        start = (*outer, row, *((0,) * (len(shape) - 1)))
        yield Slice(start, flat[: rows * inner].view((*ones, rows, *shape[1:])))
    if len(flat) > rows * inner:
        yield from _rectangles(shape[1:], 0, flat[rows * inner :], (*outer, row + rows))
