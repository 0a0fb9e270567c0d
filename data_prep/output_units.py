"""Units: a few megabytes of kept documents, tokenized and written atomically.

A unit's name is its number and a hash of its documents and of everything else that decides its
bytes. Its shards are written beside their final location and renamed, then its record is. A unit
is done if it has a record and its files have the hashes in that record; otherwise it is written
again.

So no unit needs to be flushed to disk, which would take as long as tokenizing it. Damage by a
power cut is found by the hashes, and the whole folder is flushed once, before its manifest.
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

from bitlm_dist.data.manifest import SPLITS
from bitlm_dist.data_prep import mds, round_trip
from bitlm_dist.data_prep.stage_timer import StageTimer
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.strict_json import to_json

MEGABYTE = 1_000_000
UNITS_DIR = "units"
LENGTHS_FILE = "lengths.npy"
UNIT_NAME = re.compile(r"\.?\d{5,}-[0-9a-f]{16}(\.json|\.json\.partial)?")


@dataclass(frozen=True)
class Unit:
    """Documents of one unit: UTF-8 texts and their SHA-256.

    Attributes:
        name: Number and hash of the unit.
        texts: UTF-8.
        hashes: SHA-256 of each text.
        num_documents_before: Number of documents in all earlier units.
        validation_indices: Indices of the documents held out; None: decided by their hashes.
    """

    name: str
    texts: list[bytes]
    hashes: list[bytes]
    num_documents_before: int
    validation_indices: tuple[int, ...] | None = None

    def is_held_out(self, index: int, validation_fraction: float) -> bool:
        """True if a document belongs to the validation split.

        Args:
            index: Index of the document in this unit.
            validation_fraction: Fraction of all documents to hold out.
        """
        return (
            is_held_out(self.hashes[index], validation_fraction)
            if self.validation_indices is None
            else index in self.validation_indices
        )


def split_into_units(
    documents: Iterable[tuple[bytes, bytes]], unit_bytes: int, key: str
) -> Iterator[Unit]:
    """Group documents into units of at least ``unit_bytes`` of text; the last may be smaller.

    Args:
        documents: (text, SHA-256) pairs in corpus order.
        unit_bytes: Minimum size of a unit.
        key: Represents everything besides the documents that decides a unit's bytes.
    """
    texts: list[bytes] = []
    hashes: list[bytes] = []
    size = number = num_documents_before = 0
    for text, text_hash in documents:
        texts.append(text)
        hashes.append(text_hash)
        size += len(text)
        if size >= unit_bytes:
            yield _make_unit(number, texts, hashes, num_documents_before, key)
            num_documents_before += len(texts)
            # New lists: the unit keeps the old ones.
            texts = []
            hashes = []
            size = 0
            number += 1

    if texts:
        yield _make_unit(number, texts, hashes, num_documents_before, key)


def single_document_unit(text: bytes, validation_offset: int, key: str) -> Unit:
    """Make the unit of a corpus of one document, validation from ``validation_offset`` on."""
    texts = [part for part in (text[:validation_offset], text[validation_offset:]) if part]
    unit = _make_unit(0, texts, [hashlib.sha256(part).digest() for part in texts], 0, f"{key} lone")
    return replace(unit, validation_indices=tuple(range(1, len(texts))))


def _make_unit(
    number: int, texts: list[bytes], hashes: list[bytes], num_documents_before: int, key: str
) -> Unit:
    digest = hashlib.sha256(key.encode() + b"".join(hashes)).hexdigest()
    return Unit(f"{number:05d}-{digest[:16]}", texts, hashes, num_documents_before)


def is_held_out(text_hash: bytes, validation_fraction: float) -> bool:
    """True if the document with this hash belongs to the validation split."""
    # The first 8 bytes of a SHA-256 are uniformly distributed over [0, 2^64).
    return int.from_bytes(text_hash[:8], "big") < validation_fraction * 2**64


def token_dtype(vocab_size: int) -> str:
    """Smallest dtype in which token ids are stored."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def read_unit_record(out: Path, name: str) -> dict[str, Any]:
    """Read the record of a unit.

    Returns:
        Per split, the unit's documents, tokens, bytes, ``token_bytes``, shards and files; also
        ``no_tokens`` and ``round_trip``.
    """
    record: dict[str, Any] = json.loads((out / UNITS_DIR / f"{name}.json").read_text())
    return record


def is_done(out: Path, name: str) -> bool:
    """True if a unit has a record and every file named in it is present and intact."""
    try:
        record = read_unit_record(out, name)
        # Versions without it obeyed a tokenizer's saved truncation, padding and dropout.
        if "round_trip" not in record:
            return False

        for split in SPLITS:
            for file, expected in record[split]["files"].items():
                if xxhash.xxh64_hexdigest((out / split / name / file).read_bytes()) != expected:
                    return False
    except (OSError, ValueError, KeyError):
        return False
    return True


def training_documents(out: Path, names: Iterable[str], vocab_size: int) -> Iterator[mds.Tokens]:
    """Yield the token ids of the training documents of units, in order."""
    for name in names:
        for shard in read_unit_record(out, name)["train"]["shards"]:
            yield from mds.read_documents(
                out / "train" / name / shard["zip_data"]["basename"], token_dtype(vocab_size)
            )


def write_unit(
    unit: Unit, tokenizer: Tokenizer, out: Path, validation_fraction: float
) -> dict[str, float]:
    """Tokenize a unit and write it.

    Returns:
        CPU seconds by stage.
    """
    timer = StageTimer()
    with timer("tokenize"):
        encoded = tokenizer.encode_batch([text.decode() for text in unit.texts])

    # MDS cannot store empty documents.
    non_empty = [i for i in range(len(encoded)) if len(encoded[i])]
    record: dict[str, Any] = {"name": unit.name, "no_tokens": len(encoded) - len(non_empty)}
    with timer("check"):
        texts = [unit.texts[i] for i in non_empty]
        hashes = [unit.hashes[i] for i in non_empty]
        documents: list[mds.Tokens] = [encoded[i] for i in non_empty]
        token_bytes = tokenizer.byte_lengths.of_documents(documents)
        record["round_trip"] = round_trip.check_round_trip(
            texts, hashes, documents, token_bytes, tokenizer, unit.num_documents_before
        )

    with timer("write"):
        file = out / UNITS_DIR / f"{unit.name}.json"
        # The record of a unit whose files were lost or damaged.
        file.unlink(missing_ok=True)

        for split in SPLITS:
            chosen = [
                k
                for k, i in enumerate(non_empty)
                if unit.is_held_out(i, validation_fraction) == (split == "validation")
            ]
            record[split] = _write_split(
                out / split / unit.name,
                [documents[k] for k in chosen],
                token_dtype(tokenizer.vocab_size),
            )
            record[split]["bytes"] = sum(len(texts[k]) for k in chosen)
            record[split]["token_bytes"] = int(token_bytes[chosen].sum())

        # The record comes last: it marks the unit as done.
        file.parent.mkdir(exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(to_json(record) + "\n")
        partial.rename(file)
    return dict(timer.seconds)


def _write_split(folder: Path, documents: Sequence[mds.Tokens], dtype: str) -> dict[str, Any]:
    """Write shards and lengths of a unit's documents in one split.

    Returns:
        The split's entry in the unit's record.
    """
    # The unit has no record yet, so anything in this folder is incomplete.
    shutil.rmtree(folder, ignore_errors=True)
    lengths = np.array([len(tokens) for tokens in documents], dtype=np.int64)
    record: dict[str, Any] = {
        "documents": len(documents),
        "tokens": int(lengths.sum()),
        "shards": [],
        "files": {},
    }
    if not documents:
        return record

    building = folder.with_name(f".{folder.name}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    record["shards"] = mds.write_shards(building, documents, dtype)
    np.save(building / LENGTHS_FILE, lengths)

    compressed_files = [shard["zip_data"] for shard in record["shards"]]
    record["files"] = {part["basename"]: part["hashes"]["xxh64"] for part in compressed_files}
    record["files"][LENGTHS_FILE] = xxhash.xxh64_hexdigest((building / LENGTHS_FILE).read_bytes())

    building.rename(folder)
    return record


def stale_units(out: Path, names: Sequence[str]) -> list[Path]:
    """List files and folders, complete or not, of units that are not among ``names``.

    Files that do not belong to a unit are not listed.
    """
    wanted_names = set(names)
    folders = [
        path for path in (out / UNITS_DIR, *(out / split for split in SPLITS)) if path.is_dir()
    ]

    inside = (
        path
        for path in itertools.chain(*(folder.iterdir() for folder in folders))
        if UNIT_NAME.fullmatch(path.name)
    )
    return [path for path in inside if path.name.removesuffix(".json") not in wanted_names]


def remove_stale_units(out: Path, names: Sequence[str]) -> None:
    """Remove :func:`stale_units`, and the folder of a split that is then empty."""
    for path in stale_units(out, names):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    for split in SPLITS:
        if (out / split).is_dir() and not any((out / split).iterdir()):
            (out / split).rmdir()
