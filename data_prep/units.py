"""Units: about 2 MB of documents that stay, tokenized and written as a whole or not at all.

A unit's name is its number and a hash of what it holds and how. Its shards are written beside their place and renamed, then its
record is written; a unit with a record is done for ever, and one without is written again.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bitlm_dist.data_prep import mds
from bitlm_dist.data_prep.clock import Clock
from bitlm_dist.data_prep.tokenizer import Tokenizer

from bitlm_dist.data.shards import SPLITS
from bitlm_dist.files import sync_folder, write_atomically

UNIT_BYTES = 2_000_000
UNITS, LENGTHS = "units", "lengths.npy"
NAME = re.compile(r"\.?\d{5,}-[0-9a-f]{16}(\.json|\.json\.partial)?")


@dataclass(frozen=True)
class Unit:
    """Documents of one unit: UTF-8 texts and their SHA-256."""

    name: str
    texts: list[bytes]
    hashes: list[bytes]


def cut(documents: Iterable[tuple[bytes, bytes]], key: str) -> Iterator[Unit]:
    """(text, hash) pairs to units; none is left over. ``key`` stands for all else that decides a unit's bytes."""
    texts: list[bytes] = []
    hashes: list[bytes] = []
    size = number = 0
    for text, text_hash in documents:
        texts.append(text)
        hashes.append(text_hash)
        size += len(text)
        if size >= UNIT_BYTES:
            yield _unit(number, texts, hashes, key)
            texts, hashes, size, number = [], [], 0, number + 1
    if texts:
        yield _unit(number, texts, hashes, key)


def _unit(number: int, texts: list[bytes], hashes: list[bytes], key: str) -> Unit:
    digest = hashlib.sha256(key.encode() + b"".join(hashes)).hexdigest()
    return Unit(f"{number:05d}-{digest[:16]}", texts, hashes)


def is_held_out(text_hash: bytes, share: float) -> bool:
    """Whether the document of this hash is for validation."""
    return int.from_bytes(text_hash[:8], "big") < share * 2**64


def dtype_of(vocabulary: int) -> str:
    """In which token ids are stored."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


def read_record(out: Path, name: str) -> dict[str, Any]:
    """What a unit holds: by split its documents, tokens, bytes and shards; and ``no_tokens``."""
    record: dict[str, Any] = json.loads((out / UNITS / f"{name}.json").read_text())
    return record


def is_done(out: Path, name: str) -> bool:
    """Whether a unit has a record, and every file that it names has its size."""
    if not (out / UNITS / f"{name}.json").is_file():
        return False
    record = read_record(out, name)
    for split in SPLITS:
        if not record[split]["documents"]:
            continue
        folder = out / split / name
        sizes = {LENGTHS: record[split]["lengths_bytes"]}
        sizes |= {shard["zip_data"]["basename"]: shard["zip_data"]["bytes"] for shard in record[split]["shards"]}
        for file, size in sizes.items():
            if not (folder / file).is_file() or (folder / file).stat().st_size != size:
                return False
    return True


def write(unit: Unit, tokenizer: Tokenizer, out: Path, validation: float) -> dict[str, float]:
    """Tokenize a unit and write it -> CPU seconds by stage."""
    clock = Clock()
    with clock("tokenize"):
        encoded = tokenizer.encode_batch([text.decode() for text in unit.texts])
    full = [i for i in range(len(encoded)) if len(encoded[i])]
    record: dict[str, Any] = {"name": unit.name, "no_tokens": len(encoded) - len(full)}
    with clock("write"):
        file = out / UNITS / f"{unit.name}.json"
        file.unlink(missing_ok=True)  # of a unit whose files were lost
        for split in SPLITS:
            chosen = [i for i in full if is_held_out(unit.hashes[i], validation) == (split == "validation")]
            lengths = np.array([len(encoded[i]) for i in chosen], dtype=np.int64)
            record[split] = {
                "documents": len(chosen),
                "tokens": int(lengths.sum()),
                "bytes": sum(len(unit.texts[i]) for i in chosen),
                "lengths_bytes": 0,
                "shards": [],
            }
            folder = out / split / unit.name
            shutil.rmtree(folder, ignore_errors=True)  # no record: whatever lies there is half a unit
            if chosen:
                building = folder.with_name(f".{unit.name}")
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir(parents=True)
                documents = [encoded[i] for i in chosen]
                record[split]["shards"] = mds.write_shards(building, documents, dtype_of(tokenizer.vocabulary))
                record[split]["lengths_bytes"] = _save_lengths(building / LENGTHS, lengths)
                sync_folder(building)
                building.rename(folder)
                sync_folder(folder.parent)
        write_atomically(file, json.dumps(record) + "\n")
    return dict(clock.seconds)


def _save_lengths(file: Path, lengths: np.ndarray[Any, np.dtype[np.int64]]) -> int:
    with file.open("wb") as stream:
        np.save(stream, lengths)
        mds.flush(stream)
        return stream.tell()


def remove_others(out: Path, names: Sequence[str]) -> int:
    """Remove units that are not among ``names``, whole or half -> how many were removed. Other files are left alone."""
    wanted, removed = set(names), 0
    for folder in (out / UNITS, *(out / split for split in SPLITS)):
        for path in folder.iterdir() if folder.is_dir() else ():
            if NAME.fullmatch(path.name) and path.name.removesuffix(".json") not in wanted:
                removed += path.suffix == ".json"
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    for split in SPLITS:
        if (out / split).is_dir() and not any((out / split).iterdir()):
            (out / split).rmdir()
    return removed
