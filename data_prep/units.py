"""Units: a few megabytes of documents that stay, tokenized and written as a whole or not at all.

A unit's name is its number and a hash of what it holds and how. Its shards are written beside their place and renamed, then its
record is. A unit is done if it has a record and its files have the hashes in it; any other is written again. So no unit needs to be
flushed to disk, which would take as long as tokenizing it: what a power cut damages is found by its hash, and the whole folder is
flushed once, before its manifest.
"""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from bitlm_dist.data_prep import mds, round_trip
from bitlm_dist.data_prep.clock import Clock
from bitlm_dist.data_prep.tokenizer import Tokenizer

from bitlm_dist.data.manifest import SPLITS
from bitlm_dist.files import to_json

MEGABYTE = 1_000_000
UNITS, LENGTHS = "units", "lengths.npy"
NAME = re.compile(r"\.?\d{5,}-[0-9a-f]{16}(\.json|\.json\.partial)?")


@dataclass(frozen=True)
class Unit:
    """Documents of one unit: UTF-8 texts and their SHA-256.

    Attributes:
        before: documents of the units before it.
        held_out: numbers of those for validation; None: as their hashes say.
    """

    name: str
    texts: list[bytes]
    hashes: list[bytes]
    before: int
    held_out: tuple[int, ...] | None = None

    def is_held_out(self, number: int, share: float) -> bool:
        """Whether a document is for validation, which gets ``share`` of all."""
        return is_held_out(self.hashes[number], share) if self.held_out is None else number in self.held_out


def cut(documents: Iterable[tuple[bytes, bytes]], unit_bytes: int, key: str) -> Iterator[Unit]:
    """(text, hash) pairs to units of at least ``unit_bytes`` of text, but for the last; none is left over.

    ``key`` stands for all else that decides a unit's bytes.
    """
    texts: list[bytes] = []
    hashes: list[bytes] = []
    size = number = before = 0
    for text, text_hash in documents:
        texts.append(text)
        hashes.append(text_hash)
        size += len(text)
        if size >= unit_bytes:
            yield _unit(number, texts, hashes, before, key)
            before += len(texts)
            texts, hashes, size, number = [], [], 0, number + 1
    if texts:
        yield _unit(number, texts, hashes, before, key)


def lone(text: bytes, place: int, key: str) -> Unit:
    """The unit of a lone document, whose bytes from ``place`` on are for validation."""
    texts = [part for part in (text[:place], text[place:]) if part]
    unit = _unit(0, texts, [hashlib.sha256(part).digest() for part in texts], 0, f"{key} lone")
    return replace(unit, held_out=tuple(range(1, len(texts))))


def _unit(number: int, texts: list[bytes], hashes: list[bytes], before: int, key: str) -> Unit:
    digest = hashlib.sha256(key.encode() + b"".join(hashes)).hexdigest()
    return Unit(f"{number:05d}-{digest[:16]}", texts, hashes, before)


def is_held_out(text_hash: bytes, share: float) -> bool:
    """Whether the document of this hash is for validation."""
    return int.from_bytes(text_hash[:8], "big") < share * 2**64


def dtype_of(vocabulary: int) -> str:
    """In which token ids are stored."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


def read_record(out: Path, name: str) -> dict[str, Any]:
    """What a unit holds: by split its documents, tokens, bytes, ``token_bytes`` and shards; ``no_tokens`` and ``round_trip``."""
    record: dict[str, Any] = json.loads((out / UNITS / f"{name}.json").read_text())
    return record


def is_done(out: Path, name: str) -> bool:
    """Whether a unit has a record, and every file that it names is there and whole."""
    try:
        record = read_record(out, name)
        if "round_trip" not in record:  # of a version that obeyed a tokenizer's saved truncation, padding and dropout
            return False
        for split in SPLITS:
            for file, expected in record[split]["files"].items():
                if xxhash.xxh64_hexdigest((out / split / name / file).read_bytes()) != expected:
                    return False
    except (OSError, ValueError, KeyError):
        return False
    return True


def training_documents(out: Path, names: Iterable[str], vocabulary: int) -> Iterator[mds.Tokens]:
    """The token ids of the training documents of some units, in order."""
    for name in names:
        for shard in read_record(out, name)["train"]["shards"]:
            yield from mds.read_documents(out / "train" / name / shard["zip_data"]["basename"], dtype_of(vocabulary))


def write(unit: Unit, tokenizer: Tokenizer, out: Path, validation: float) -> dict[str, float]:
    """Tokenize a unit and write it -> CPU seconds by stage."""
    clock = Clock()
    with clock("tokenize"):
        encoded = tokenizer.encode_batch([text.decode() for text in unit.texts])
    full = [i for i in range(len(encoded)) if len(encoded[i])]
    record: dict[str, Any] = {"name": unit.name, "no_tokens": len(encoded) - len(full)}
    with clock("check"):
        texts, hashes = [unit.texts[i] for i in full], [unit.hashes[i] for i in full]
        documents: list[mds.Tokens] = [encoded[i] for i in full]
        token_bytes = tokenizer.byte_lengths.of_documents(documents)
        record["round_trip"] = round_trip.examine(texts, hashes, documents, token_bytes, tokenizer, unit.before)
    with clock("write"):
        file = out / UNITS / f"{unit.name}.json"
        file.unlink(missing_ok=True)  # of a unit whose files were lost
        for split in SPLITS:
            chosen = [k for k, i in enumerate(full) if unit.is_held_out(i, validation) == (split == "validation")]
            record[split] = _write_split(out / split / unit.name, [documents[k] for k in chosen], dtype_of(tokenizer.vocabulary))
            record[split]["bytes"] = sum(len(texts[k]) for k in chosen)
            record[split]["token_bytes"] = int(token_bytes[chosen].sum())
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(to_json(record) + "\n")
        partial.rename(file)
    return dict(clock.seconds)


def _write_split(folder: Path, documents: Sequence[mds.Tokens], dtype: str) -> dict[str, Any]:
    """Shards and lengths of a unit's documents of one split -> its part of the record."""
    shutil.rmtree(folder, ignore_errors=True)  # no record: whatever lies there is half a unit
    lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)
    record: dict[str, Any] = {"documents": len(documents), "tokens": int(lengths.sum()), "shards": [], "files": {}}
    if not documents:
        return record
    building = folder.with_name(f".{folder.name}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    record["shards"] = mds.write_shards(building, documents, dtype)
    np.save(building / LENGTHS, lengths)
    packed = [shard["zip_data"] for shard in record["shards"]]
    record["files"] = {part["basename"]: part["hashes"]["xxh64"] for part in packed}
    record["files"][LENGTHS] = xxhash.xxh64_hexdigest((building / LENGTHS).read_bytes())
    building.rename(folder)
    return record


def others(out: Path, names: Sequence[str]) -> list[Path]:
    """Units that are not among ``names``, whole or half. Files that are no unit's are not listed."""
    wanted = set(names)
    folders = [path for path in (out / UNITS, *(out / split for split in SPLITS)) if path.is_dir()]
    inside = (path for path in itertools.chain(*(folder.iterdir() for folder in folders)) if NAME.fullmatch(path.name))
    return [path for path in inside if path.name.removesuffix(".json") not in wanted]


def remove_others(out: Path, names: Sequence[str]) -> None:
    """Remove :func:`others`, and a split's folder that holds nothing then."""
    for path in others(out, names):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for split in SPLITS:
        if (out / split).is_dir() and not any((out / split).iterdir()):
            (out / split).rmdir()
