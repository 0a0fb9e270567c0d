"""Tensors on disk: one safetensors file of shards per rank, and an index of which file holds which.

safetensors holds no code, is read by many tools, and lets a reader load just the rectangle that it
needs. Nothing here communicates with other ranks, so files can be written by a thread during
training.

A shard's key in its file is the tensor's name, plus the offsets if it is not the full tensor:
``NAME@ROW,COLUMN``.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from bitlm_dist.errors import UserError
from bitlm_dist.parallel.sharded_tensor import Shard, ShardedTensor
from bitlm_dist.strict_json import to_json

INDEX = "index.json"
# Components of the head's weight names before 0.2.0, and what they are called today.
_RENAMED_WEIGHTS = {
    "null": "null_embedding",
    "ahead": "lookahead",
    "places": "position_bias",
    "evidence_in": "posterior_in",
    "before_in": "previous_token_in",
    "tables": "conditional_group_logits",
}
# Before 0.3.0, the lookahead of each position was a tensor of its own.
_OLD_LOOKAHEAD = re.compile(r"((?:model|optimizer)\.head\.lookahead)\.([0-9]+)(\.weight.*)")
_OLD_WEIGHT = re.compile(rf"^((?:model|optimizer)\.head)\.({'|'.join(_RENAMED_WEIGHTS)})\b")
SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
}
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


class ShardEntry(NamedTuple):
    """A shard's description in the index."""

    name: str  # of the tensor
    dtype: str  # as safetensors calls it
    full_shape: tuple[int, ...]  # of the full tensor
    offsets: tuple[int, ...]  # of the shard's first element, one per dimension
    sizes: tuple[int, ...]  # the shard's shape

    @classmethod
    def full(cls, name: str, dtype: torch.dtype, shape: Sequence[int]) -> "ShardEntry":
        """The entry of a full tensor."""
        return cls(name, SAFETENSORS_DTYPES[dtype], tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def key(self) -> str:
        """The shard's name in its file."""
        return (
            self.name
            if self.sizes == self.full_shape
            else f"{self.name}@{','.join(map(str, self.offsets))}"
        )

    @property
    def num_bytes(self) -> int:
        """Size of the shard's elements."""
        return prod(self.sizes) * TORCH_DTYPES[self.dtype].itemsize


class FileDigest(NamedTuple):
    """Size and hash of a file, by which damage is detected."""

    bytes: int
    sha256: str


def local_entries(tensors: Mapping[str, ShardedTensor]) -> dict[ShardEntry, Tensor]:
    """The elements of every shard of this rank, by its entry."""
    return {
        ShardEntry(
            name,
            SAFETENSORS_DTYPES[sharded.dtype],
            tuple(sharded.shape),
            shard.offsets,
            tuple(shard.tensor.shape),
        ): shard.tensor
        for name, sharded in tensors.items()
        for shard in sharded.shards
    }


def assign_writers(entries_per_rank: Sequence[Sequence[ShardEntry]]) -> list[list[ShardEntry]]:
    """Assign every shard to one of the ranks that hold it.

    The largest shards are assigned first, each to the holder with the fewest elements so far.

    Args:
        entries_per_rank: The shards that each rank holds.

    Returns:
        The shards that each rank writes.
    """
    holders: dict[ShardEntry, list[int]] = defaultdict(list)
    for rank, entries in enumerate(entries_per_rank):
        for entry in entries:
            holders[entry].append(rank)

    assigned: list[list[ShardEntry]] = [[] for _ in entries_per_rank]
    load = [0] * len(entries_per_rank)
    for entry, ranks in sorted(holders.items(), key=lambda item: (-prod(item[0].sizes), item[0])):
        rank = min(ranks, key=load.__getitem__)
        assigned[rank].append(entry)
        load[rank] += prod(entry.sizes)

    # A layout whose shards leave a hole must fail here, not when the checkpoint is loaded.
    numel: dict[str, int] = defaultdict(int)
    for entry in holders:
        numel[entry.name] += prod(entry.sizes)
    for entry in holders:
        assert numel[entry.name] == prod(entry.full_shape), (
            f"the ranks' shards of {entry.name} do not cover it"
        )
    return assigned


def write_safetensors(
    file: Path, entries: Sequence[ShardEntry], tensors: Iterable[Tensor]
) -> FileDigest:
    """Write a safetensors file, hash it while writing, and flush it to disk.

    Args:
        file: The file to write.
        entries: The shards that it will hold, in this order.
        tensors: Their elements, consumed one after the other.

    Returns:
        Size and hash of the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin = end
        end += entry.num_bytes
        header[entry.key] = {
            "dtype": entry.dtype,
            "shape": entry.sizes,
            "data_offsets": [begin, end],
        }

    text = to_json(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns elements to 8 bytes

    digest = hashlib.sha256()
    num_bytes = 0
    with file.open("wb") as stream:
        chunks: Iterator[Any] = chain(
            (len(text).to_bytes(8, "little"), text), map(_bytes_of, tensors)
        )
        for chunk in chunks:
            stream.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)

        # On disk before the manifest names it: a crash of the machine must not leave an empty file.
        stream.flush()
        os.fsync(stream.fileno())
    return FileDigest(num_bytes, digest.hexdigest())


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def index_text(files: Mapping[str, Sequence[ShardEntry]]) -> str:
    """The text of a folder's index.

    Args:
        files: The shards in each file.
    """
    tensors: dict[str, Any] = {}
    for file, entries in files.items():
        for entry in entries:
            tensor = tensors.setdefault(
                entry.name, {"dtype": entry.dtype, "shape": entry.full_shape, "slices": []}
            )
            tensor["slices"].append({"start": entry.offsets, "shape": entry.sizes, "file": file})

    # Sorted, so that the text depends on the contents alone.
    return to_json({name: tensors[name] for name in sorted(tensors)}, separators=(",", ":")) + "\n"


@dataclass(frozen=True)
class TensorIndex:
    """A tensor in a checkpoint: dtype, shape, and its shards.

    Each shard has the file that holds it and, if the file has a part of the tensor as a tensor of
    its own, the index of that part along the first dimension.
    """

    dtype: torch.dtype
    shape: torch.Size
    shards: Sequence[tuple[ShardEntry, str, tuple[int, ...]]]


def read_index(folder: Path) -> dict[str, TensorIndex]:
    """Read which tensors a folder's files hold, by their current names."""
    index: dict[str, TensorIndex] = {}
    for name, tensor in json.loads((folder / INDEX).read_text()).items():
        shape = tuple(tensor["shape"])
        # The entries keep the name that the file has, for they are its keys.
        shards = [
            (
                ShardEntry(
                    name, tensor["dtype"], shape, tuple(shard["start"]), tuple(shard["shape"])
                ),
                shard["file"],
                (),
            )
            for shard in tensor["slices"]
        ]

        index[current_name(name)] = TensorIndex(
            TORCH_DTYPES[tensor["dtype"]], torch.Size(shape), shards
        )
    return _stack_lookahead(index)


def _stack_lookahead(index: Mapping[str, TensorIndex]) -> dict[str, TensorIndex]:
    """Present tensors of which an older checkpoint holds the parts as the stacks that they are."""
    stacked: dict[str, TensorIndex] = {}
    parts: dict[str, dict[int, TensorIndex]] = defaultdict(dict)
    for name, tensor in index.items():
        if match := _OLD_LOOKAHEAD.fullmatch(name):
            parts[f"{match[1]}{match[3]}"][int(match[2])] = tensor
        else:
            stacked[name] = tensor

    for name, tensors in parts.items():
        first = next(iter(tensors.values()))
        stacked[name] = first
        if first.shape:  # all parts have the same step count
            shards = [
                (entry, file, (number,))
                for number, tensor in tensors.items()
                for entry, file, _ in tensor.shards
            ]
            # A part that is missing leaves a hole, which load_shards reports.
            shape = torch.Size((max(tensors) + 1, *first.shape))
            stacked[name] = TensorIndex(first.dtype, shape, shards)
    return stacked


def current_name(name: str) -> str:
    """The name in this version of a tensor in a checkpoint of any version."""
    return _OLD_WEIGHT.sub(lambda match: f"{match[1]}.{_RENAMED_WEIGHTS[match[2]]}", name)


class Overlap(NamedTuple):
    """A rectangle of a saved shard, and the view that it is copied to."""

    key: str  # of the saved shard in its file
    source: tuple[slice, ...]
    target: Tensor


def _overlaps(stored: TensorIndex, wanted: Shard) -> Iterator[tuple[str, Overlap]]:
    """Yield the file and the rectangle of every saved shard that overlaps with a wanted one."""
    for entry, file, part in stored.shards:
        # In coordinates of the full tensor.
        offsets = (*part, *entry.offsets)
        sizes = (*(1 for _ in part), *entry.sizes)
        begin = [max(a, b) for a, b in zip(offsets, wanted.offsets, strict=True)]
        ends = zip(offsets, sizes, wanted.offsets, wanted.tensor.shape, strict=True)
        end = [min(a + m, b + n) for a, m, b, n in ends]

        if all(b < e for b, e in zip(begin, end, strict=True)):
            source = tuple(slice(b - a, e - a) for a, b, e in zip(offsets, begin, end, strict=True))
            source = source[len(part) :]
            target = tuple(
                slice(b - a, e - a) for a, b, e in zip(wanted.offsets, begin, end, strict=True)
            )
            yield file, Overlap(entry.key, source, wanted.tensor[target])


def check_all_wanted(folder: Path, stored: Iterable[str], wanted: Container[str]) -> None:
    """Check that a model has a place for every stored tensor.

    Args:
        folder: The checkpoint.
        stored: Names of the tensors that it holds.
        wanted: Names of the tensors that are loaded, by this rank or another one.

    Raises:
        UserError: Some are not wanted; names the first ones.
    """
    unwanted = sorted(name for name in stored if name not in wanted)
    if unwanted:
        others = f" and {len(unwanted) - 3:,} more" if len(unwanted) > 3 else ""
        raise UserError(
            f"{folder}: holds {', '.join(unwanted[:3])}{others}, which the model does not have: "
            "it is a checkpoint of another model"
        )


@torch.no_grad()
def load_shards(
    folder: Path,
    tensors: Mapping[str, ShardedTensor],
    index: Mapping[str, TensorIndex] | None = None,
) -> None:
    """Load a checkpoint into the shards of ``tensors``, however it was sharded when saved.

    Only the needed parts of the files are read.

    Args:
        folder: The checkpoint.
        tensors: The shards to fill, by tensor name.
        index: The tensors that must all be wanted, from the folder's :func:`read_index`; default:
            all that it holds.

    Raises:
        UserError: A tensor is missing, incomplete or has another shape, or one of ``index`` is not
            wanted. Nothing was loaded.
    """
    index = read_index(folder) if index is None else index

    # By file, so that each is opened once.
    by_file: dict[str, list[Overlap]] = defaultdict(list)
    for name, sharded in tensors.items():
        stored = index.get(name)
        if stored is None or stored.shape != sharded.shape:
            problem = "is missing" if stored is None else f"has shape {tuple(stored.shape)}"
            raise UserError(
                f"{folder}: {name} {problem}, the model has {tuple(sharded.shape)}: "
                "it is a checkpoint of another model"
            )

        for wanted in sharded.shards:
            # Saved shards do not overlap with each other, so counting elements is enough.
            covered_numel = 0
            for file, overlap in _overlaps(stored, wanted):
                by_file[file].append(overlap)
                covered_numel += overlap.target.numel()
            if covered_numel != wanted.tensor.numel():
                raise UserError(
                    f"{folder}: {name} is incomplete: {INDEX} names {covered_numel} of "
                    f"{wanted.tensor.numel()} elements"
                )

    # What a smaller model leaves aside would be lost without a word.
    check_all_wanted(folder, index, tensors)

    for file, overlaps in by_file.items():
        with safe_open(folder / file, "pt") as opened:
            for overlap in overlaps:
                overlap.target.copy_(opened.get_slice(overlap.key)[overlap.source])


def load_full(folder: Path, name: str, index: Mapping[str, TensorIndex]) -> Tensor:
    """Load one full tensor of a folder."""
    full = torch.empty(index[name].shape, dtype=index[name].dtype)
    load_shards(folder, {name: ShardedTensor.from_full(full)}, {name: index[name]})
    return full
