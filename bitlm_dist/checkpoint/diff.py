"""Two checkpoints, number by number, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint.tensors import Stored, read, read_index
from bitlm_dist.config_loading import flatten
from bitlm_dist.parallel.sliced import Slice, Sliced

BLOCK = 2**24  # numbers of each side in memory at once
WEIGHTS = "model."


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in both.

    Args:
        name: of the tensor.
        largest: absolute difference of a number; infinite where one side lacks the tensor or has another shape.
        relative: norm of the difference over the norm of the first.
        note: why the numbers could not be compared.
    """

    name: str
    largest: float
    relative: float
    note: str = ""

    @property
    def kind(self) -> str:
        """``weights``, or the slot of optimizer state."""
        return kind_of(self.name)


def kind_of(name: str) -> str:
    """``weights``, or the slot of optimizer state that a tensor is."""
    return "weights" if name.startswith(WEIGHTS) else name.rpartition(".")[2]


def compare(first: Path, second: Path) -> tuple[dict[str, int], list[Difference]]:
    """Compare the tensors of two checkpoints -> number of tensors of each kind, and those that differ, the most different first."""
    indices = read_index(first), read_index(second)
    found, counts = [], dict[str, int]()
    for name in sorted(indices[0].keys() | indices[1].keys()):
        counts[kind_of(name)] = counts.get(kind_of(name), 0) + 1
        sides = [index.get(name) for index in indices]
        difference = _compare_tensor(name, (first, second), sides[0], sides[1])
        if difference.largest > 0:
            found.append(difference)
    return counts, sorted(found, key=lambda d: -d.relative)


def _compare_tensor(name: str, folders: tuple[Path, Path], a: Stored | None, b: Stored | None) -> Difference:
    if a is None or b is None:
        return Difference(name, inf, inf, f"only in the {'second' if a is None else 'first'}")
    if a.shape != b.shape:
        return Difference(name, inf, inf, f"shape {tuple(a.shape)} and {tuple(b.shape)}")
    largest = off = size = 0.0
    for blocks in zip(_blocks(name, folders[0], a), _blocks(name, folders[1], b), strict=True):
        x, y = (block.double() for block in blocks)
        apart = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, x - y).nan_to_num(nan=inf, posinf=inf, neginf=-inf)
        largest = max(largest, float(apart.abs().max()) if apart.numel() else 0.0)
        off, size = off + float(apart.square().sum()), size + float(x.square().sum())
    relative = sqrt(off / size) if size else inf
    return Difference(name, largest, (0.0 if off == 0 else relative) if isfinite(size) and isfinite(off) else inf)


def _blocks(name: str, folder: Path, stored: Stored) -> Iterator[Tensor]:
    """A tensor in whole rows, about :data:`BLOCK` numbers at a time."""
    shape = stored.shape
    if not shape:
        whole = torch.empty((), dtype=stored.dtype)
        read(folder, {name: Sliced.whole(whole)}, {name: stored})
        yield whole
        return
    rows = max(1, BLOCK // max(1, prod(shape[1:])))
    for row in range(0, shape[0], rows):
        block = torch.empty((min(rows, shape[0] - row), *shape[1:]), dtype=stored.dtype)
        part = Slice((row, *(0 for _ in shape[1:])), block)
        read(folder, {name: Sliced(shape, stored.dtype, [part])}, {name: stored})
        yield block


def compare_states(first: Path, second: Path) -> dict[str, tuple[Any, Any]]:
    """What else the two say differently: step, position, every key of the config; not time spent and versions."""
    states = [store.read_state(folder) for folder in (first, second)]
    flat = [
        {
            **{key: state.get(key) for key in ("step", "tokens", "next_sequence")},
            **dict(flatten(state.get("fingerprint", {}))),
            **dict(flatten(state.get("config", {}))),
        }
        for state in states
    ]
    keys = sorted(flat[0].keys() | flat[1].keys())
    return {key: (flat[0].get(key), flat[1].get(key)) for key in keys if flat[0].get(key) != flat[1].get(key)}
