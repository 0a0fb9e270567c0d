"""The prepared folder as a whole: whose it is, its indices over all units, its manifest.

manifest.json is removed before the first unit of a begun folder is written and written last of all: a folder that has one is whole.
"""

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from bitlm_dist.data_prep.tokenizer import TOKENIZER
from bitlm_dist.data_prep.units import LENGTHS, UNITS, read_record

from bitlm_dist.data.manifest import MANIFEST, SPLITS
from bitlm_dist.errors import UserError
from bitlm_dist.files import DISK_FULL, sha256_of, to_json, try_lock, write_atomically

CLAIM, WORK, INDEX, REPORT = "settings.json", ".work", "index.json", "report.md"
STATISTICS = "statistics.npz"  # as bitlm_dist.data.vocabulary has it, whose import would bring torch


@contextmanager
def claimed(out: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Make ``out`` ours for as long as this is open, or refuse it -> a folder for temporary files in it.

    Raises:
        UserError: the folder is of other origin or has other settings (nothing in it was touched), another process prepares
            it, or its disk is full or cannot be written.
    """
    _check(out, settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            if not (out / CLAIM).is_file():
                write_atomically(out / CLAIM, to_json(settings, indent=1) + "\n")
            shutil.rmtree(out / WORK, ignore_errors=True)
            (out / WORK).mkdir()
            try:
                yield out / WORK
            except UserError:
                _leave_nothing(out)
                raise
            finally:
                shutil.rmtree(out / WORK, ignore_errors=True)
    except OSError as error:  # those of sources are UserErrors by now
        if error.errno in DISK_FULL:
            raise UserError(
                f"{out}: the disk is full: make room and run the same command again, which goes on from the finished units"
            ) from None
        raise UserError(f"{out} cannot be written: {error.filename or ''} {error.strerror or error}") from None


def _check(out: Path, settings: Mapping[str, Any]) -> None:
    claim = out / CLAIM
    if not claim.is_file():
        if out.exists() and (not out.is_dir() or any(path.name != f".{CLAIM}.partial" for path in out.iterdir())):
            raise UserError(f"{out} exists and was not written by `bitlm prep`: choose another --out")
        return
    try:
        found = json.loads(claim.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or "tokenizer" not in found:
        raise UserError(f"{claim} is not of `bitlm prep`: choose another --out")
    for key in (*settings, *found):
        if found.get(key) != settings.get(key):
            raise UserError(f"{out} was prepared with another {key}: choose another --out or remove the folder")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    descriptor = os.open(out, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise UserError(f"{out} is being prepared by another process: wait for it or choose another --out")
        yield
    finally:
        os.close(descriptor)


def _leave_nothing(out: Path) -> None:
    """Remove the folder after an error that came before the first unit."""
    units = out / UNITS
    if not units.is_dir() or not any(units.iterdir()):
        for name in (WORK, ".tokenizer", "tokenizer", UNITS, *SPLITS):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / CLAIM).unlink(missing_ok=True)
        if not any(out.iterdir()):
            out.rmdir()


def merge(out: Path, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Write index and lengths of each split over all units -> totals of each split.

    Nothing that grows with the corpus is held in memory.
    """
    totals = {split: dict.fromkeys(("documents", "tokens", "bytes", "token_bytes", "stored_bytes"), 0) for split in SPLITS}
    for split in SPLITS:
        total = totals[split]
        parts = [(out / split / f".{name}", out / split / name) for name in (INDEX, LENGTHS)]
        for record in _records(out, names, split):
            for key in ("documents", "tokens", "bytes", "token_bytes"):
                total[key] += record[key]
            total["stored_bytes"] += sum(shard["zip_data"]["bytes"] for shard in record["shards"])
        if not total["documents"]:
            for _, file in parts:
                file.unlink(missing_ok=True)
            continue
        _write_index(parts[0][0], out, names, split)
        _write_lengths(parts[1][0], out, names, split, total["documents"])
        for partial, file in parts:
            partial.rename(file)
    return totals


def _records(out: Path, names: Sequence[str], split: str) -> Iterator[dict[str, Any]]:
    for name in names:
        record = read_record(out, name)[split]
        if record["documents"]:
            yield {"name": name, **record}


def _write_index(file: Path, out: Path, names: Sequence[str], split: str) -> None:
    with file.open("w") as stream:
        stream.write('{"version": 2, "shards": [')
        begun = False
        for record in _records(out, names, split):
            for shard in record["shards"]:
                for part in ("raw_data", "zip_data"):
                    shard[part]["basename"] = os.path.join(record["name"], shard[part]["basename"])
                stream.write((",\n" if begun else "\n") + to_json(shard))
                begun = True
        stream.write("\n]}\n")


def _write_lengths(file: Path, out: Path, names: Sequence[str], split: str, documents: int) -> None:
    with file.open("wb") as stream:
        header = {"descr": "<i8", "fortran_order": False, "shape": (documents,)}
        np.lib.format.write_array_header_1_0(stream, header)
        for record in _records(out, names, split):
            stream.write(np.load(out / split / record["name"] / LENGTHS).tobytes())


def flush(out: Path) -> None:
    """Flush all files below ``out`` to disk, together."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        if sys.platform != "linux" or ctypes.CDLL(None).syncfs(descriptor):
            os.sync()
    finally:
        os.close(descriptor)


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of the tokenizer and of the files over all units, by name."""
    files = [out / split / name for split in SPLITS for name in (INDEX, LENGTHS)]
    files += [out / STATISTICS, *(out / TOKENIZER).iterdir()]
    return {file.relative_to(out).as_posix(): sha256_of(file) for file in files if file.is_file()}


def manifest_of(out: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder."""
    file = out / MANIFEST
    return json.loads(file.read_text()) if file.is_file() else None
