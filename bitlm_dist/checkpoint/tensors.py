"""Tensors on disk: one safetensors file a rank with the slices that it writes, and an index of which file holds which slice.

safetensors holds no code, any tool opens it, and a reader takes the rectangle that it needs out of a file. Nothing here talks to
other ranks, so files can be written by a thread while training goes on.

A slice's key in its file is the tensor's name, and for a part of a tensor its place too: ``NAME@ROW,COLUMN``.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from bitlm_dist.errors import UserError
from bitlm_dist.files import to_json
from bitlm_dist.parallel.sliced import Slice, Sliced

INDEX = "index.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}
NAMES = {name: dtype for dtype, name in DTYPES.items()}


class Entry(NamedTuple):
    """A slice as the index has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # of the whole tensor
    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, dtype: torch.dtype, shape: Sequence[int]) -> "Entry":
        """All of a tensor."""
        return cls(name, DTYPES[dtype], tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def key(self) -> str:
        """Its name in the file."""
        return self.name if self.size == self.shape else f"{self.name}@{','.join(map(str, self.start))}"

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return prod(self.size) * NAMES[self.dtype].itemsize


class Written(NamedTuple):
    """What a file on disk must be."""

    bytes: int
    sha256: str


def entries_of(tensors: Mapping[str, Sliced]) -> dict[Entry, Tensor]:
    """Every slice of this rank with its numbers."""
    return {
        Entry(name, DTYPES[whole.dtype], tuple(whole.shape), part.start, tuple(part.tensor.shape)): part.tensor
        for name, whole in tensors.items()
        for part in whole.slices
    }


def share_out(held: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
    """What each rank holds -> what each rank writes: every slice once, the largest first, each to the holder with least so far."""
    holders: dict[Entry, list[int]] = defaultdict(list)
    for rank, entries in enumerate(held):
        for entry in entries:
            holders[entry].append(rank)
    found: list[list[Entry]] = [[] for _ in held]
    load = [0] * len(held)
    for entry, ranks in sorted(holders.items(), key=lambda item: (-prod(item[0].size), item[0])):
        rank = min(ranks, key=load.__getitem__)
        found[rank].append(entry)
        load[rank] += prod(entry.size)
    numbers: dict[str, int] = defaultdict(int)
    for entry in holders:
        numbers[entry.name] += prod(entry.size)
    for entry in holders:
        assert numbers[entry.name] == prod(entry.shape), f"the ranks' slices of {entry.name} do not make it whole"
    return found


def write(file: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> Written:
    """Write a safetensors file, hashing on the way, and flush it to disk.

    Args:
        entries: what it will hold, in this order.
        tensors: their numbers, asked for one after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.bytes
        header[entry.key] = {"dtype": entry.dtype, "shape": entry.size, "data_offsets": [begin, end]}
    text = to_json(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers are aligned
    digest, size = hashlib.sha256(), 0
    with file.open("wb") as stream:
        parts: Iterator[Any] = chain((len(text).to_bytes(8, "little"), text), map(_bytes_of, tensors))
        for part in parts:
            stream.write(part)
            digest.update(part)
            size += len(part)
        stream.flush()
        os.fsync(stream.fileno())
    return Written(size, digest.hexdigest())


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def index_of(files: Mapping[str, Sequence[Entry]]) -> str:
    """What the files of a folder hold -> the text of its index."""
    tensors: dict[str, Any] = {}
    for file, entries in files.items():
        for entry in entries:
            found = tensors.setdefault(entry.name, {"dtype": entry.dtype, "shape": entry.shape, "slices": []})
            found["slices"].append({"start": entry.start, "shape": entry.size, "file": file})
    return to_json({name: tensors[name] for name in sorted(tensors)}, separators=(",", ":")) + "\n"


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint: shape, precision, and its slices, each with the file that holds it."""

    dtype: torch.dtype
    shape: torch.Size
    slices: Sequence[tuple[Entry, str]]


def read_index(folder: Path) -> dict[str, Stored]:
    """What a folder's files hold."""
    found: dict[str, Stored] = {}
    for name, tensor in json.loads((folder / INDEX).read_text()).items():
        shape = tuple(tensor["shape"])
        slices = [
            (Entry(name, tensor["dtype"], shape, tuple(part["start"]), tuple(part["shape"])), part["file"])
            for part in tensor["slices"]
        ]
        found[name] = Stored(NAMES[tensor["dtype"]], torch.Size(shape), slices)
    return found


class Overlap(NamedTuple):
    """A rectangle of a saved slice, and the view that its numbers go to."""

    key: str
    source: tuple[slice, ...]
    target: Tensor


def _overlaps(stored: Stored, wanted: Slice) -> Iterator[tuple[str, Overlap]]:
    for entry, file in stored.slices:
        begin = [max(a, b) for a, b in zip(entry.start, wanted.start, strict=True)]
        ends = zip(entry.start, entry.size, wanted.start, wanted.tensor.shape, strict=True)
        end = [min(a + m, b + n) for a, m, b, n in ends]
        if all(b < e for b, e in zip(begin, end, strict=True)):
            source = tuple(slice(b - a, e - a) for a, b, e in zip(entry.start, begin, end, strict=True))
            target = tuple(slice(b - a, e - a) for a, b, e in zip(wanted.start, begin, end, strict=True))
            yield file, Overlap(entry.key, source, wanted.tensor[target])


@torch.no_grad()
def read(folder: Path, tensors: Mapping[str, Sliced], index: Mapping[str, Stored] | None = None) -> None:
    """Copy what a folder's files hold into the slices of ``tensors``, whatever cut it was saved in; no file is read as a whole.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    index = read_index(folder) if index is None else index
    by_file: dict[str, list[Overlap]] = defaultdict(list)
    for name, whole in tensors.items():
        stored = index.get(name)
        if stored is None or stored.shape != whole.shape:
            found = "is missing" if stored is None else f"has shape {tuple(stored.shape)}"
            raise UserError(f"{folder}: {name} {found}, the model has {tuple(whole.shape)}: it is a checkpoint of another model")
        for wanted in whole.slices:
            found_numbers = 0
            for file, overlap in _overlaps(stored, wanted):
                by_file[file].append(overlap)
                found_numbers += overlap.target.numel()
            if found_numbers != wanted.tensor.numel():
                raise UserError(f"{folder}: {name} is not whole: {INDEX} names {found_numbers} of {wanted.tensor.numel()} numbers")
    for file, overlaps in by_file.items():
        with safe_open(folder / file, "pt") as opened:
            for overlap in overlaps:
                overlap.target.copy_(opened.get_slice(overlap.key)[overlap.source])


def read_whole(folder: Path, name: str, index: Mapping[str, Stored]) -> Tensor:
    """One tensor of a folder, put together."""
    whole = torch.empty(index[name].shape, dtype=index[name].dtype)
    read(folder, {name: Sliced.whole(whole)}, index)
    return whole
