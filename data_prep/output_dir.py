"""The prepared folder: its ownership, the indices over all units, and the manifest.

manifest.json is removed before the first unit of an unfinished folder is written, and is written
last of all: a folder with a manifest is complete.
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

from bitlm_dist.data.manifest import MANIFEST, SPLITS
from bitlm_dist.data_prep.output_units import LENGTHS_FILE, UNITS_DIR, read_unit_record
from bitlm_dist.data_prep.tokenizer import TOKENIZER_DIR
from bitlm_dist.errors import UserError, os_error_message
from bitlm_dist.files import (
    DISK_FULL,
    missing_folders,
    remove_empty_folders,
    sha256_of,
    try_lock,
    write_atomically,
)
from bitlm_dist.strict_json import to_json

SETTINGS_FILE = "settings.json"
WORK_DIR = ".work"
INDEX_FILE = "index.json"
REPORT_FILE = "report.md"
# The name in bitlm_dist.data.vocabulary; importing that module would bring torch.
STATISTICS_FILE = "statistics.npz"


@contextmanager
def acquired(out: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Lock ``out`` for this preparation while the context is open.

    Yields:
        A folder for temporary files inside ``out``.

    Raises:
        UserError: The folder was not written by `bitlm prep` or has other settings (nothing in it
            was touched), another process is preparing it, or its disk is full or not writable.
    """
    _check_settings(out, settings)
    created = missing_folders(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            if not (out / SETTINGS_FILE).is_file():
                write_atomically(out / SETTINGS_FILE, to_json(settings, indent=1) + "\n")

            # A killed preparation may have left temporary files.
            shutil.rmtree(out / WORK_DIR, ignore_errors=True)
            (out / WORK_DIR).mkdir()

            try:
                yield out / WORK_DIR
            except UserError:
                _remove_without_units(out)
                raise
            finally:
                shutil.rmtree(out / WORK_DIR, ignore_errors=True)
    except OSError as error:  # errors of sources have already become UserErrors
        if error.errno in DISK_FULL:
            raise UserError(
                f"{out}: the disk is full: make room and run the same command again, "
                "which continues from the finished units"
            ) from None
        where = "" if error.filename else f"{out}: "
        raise UserError(f"{where}{os_error_message(error)}") from None
    finally:
        remove_empty_folders(created)  # those of a preparation that came to nothing


def _check_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that was not written by `bitlm prep`, or with other settings."""
    settings_file = out / SETTINGS_FILE
    if not settings_file.is_file():
        # A kill while the settings were written leaves only the partial file.
        if out.exists() and (
            not out.is_dir()
            or any(path.name != f".{SETTINGS_FILE}.partial" for path in out.iterdir())
        ):
            raise UserError(
                f"{out} exists and was not written by `bitlm prep`: choose another --out"
            )
        return

    try:
        saved = json.loads(settings_file.read_text())
    except ValueError:
        saved = None
    if not isinstance(saved, dict) or "tokenizer" not in saved:
        raise UserError(f"{settings_file} was not written by `bitlm prep`: choose another --out")

    for key in (*settings, *saved):
        if saved.get(key) != settings.get(key):
            raise UserError(
                f"{out} was prepared with another {key}: choose another --out or remove the folder"
            )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    descriptor = os.open(out, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise UserError(
                f"{out} is being prepared by another process: wait for it or choose another --out"
            )
        yield
    finally:
        os.close(descriptor)


def _remove_without_units(out: Path) -> None:
    """Remove the folder after an error that came before the first unit."""
    units_dir = out / UNITS_DIR
    if not units_dir.is_dir() or not any(units_dir.iterdir()):
        for name in (WORK_DIR, ".tokenizer", "tokenizer", UNITS_DIR, *SPLITS):
            shutil.rmtree(out / name, ignore_errors=True)
        (out / SETTINGS_FILE).unlink(missing_ok=True)

        if not any(out.iterdir()):
            out.rmdir()


def merge_units(out: Path, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Write the index and the lengths of each split over all units.

    Memory does not grow with the corpus.

    Returns:
        Totals per split.
    """
    totals = {
        split: dict.fromkeys(("documents", "tokens", "bytes", "token_bytes", "stored_bytes"), 0)
        for split in SPLITS
    }
    for split in SPLITS:
        total = totals[split]
        index_files = [
            (out / split / f".{name}", out / split / name) for name in (INDEX_FILE, LENGTHS_FILE)
        ]

        for record in _unit_records(out, names, split):
            for key in ("documents", "tokens", "bytes", "token_bytes"):
                total[key] += record[key]
            total["stored_bytes"] += sum(shard["zip_data"]["bytes"] for shard in record["shards"])

        if not total["documents"]:
            # An earlier run may have written documents to this split.
            for _, file in index_files:
                file.unlink(missing_ok=True)
            continue

        _write_index(index_files[0][0], out, names, split)
        _write_lengths(index_files[1][0], out, names, split, total["documents"])
        for partial, file in index_files:
            partial.rename(file)
    return totals


def _unit_records(out: Path, names: Sequence[str], split: str) -> Iterator[dict[str, Any]]:
    """Yield the records of the units that have documents in ``split``."""
    for name in names:
        record = read_unit_record(out, name)[split]
        if record["documents"]:
            yield {"name": name, **record}


def _write_index(file: Path, out: Path, names: Sequence[str], split: str) -> None:
    """Stream the index.json of a split, one shard per line."""
    with file.open("w") as stream:
        stream.write('{"version": 2, "shards": [')
        has_entries = False
        for record in _unit_records(out, names, split):
            for shard in record["shards"]:
                for part in ("raw_data", "zip_data"):
                    shard[part]["basename"] = os.path.join(record["name"], shard[part]["basename"])
                stream.write((",\n" if has_entries else "\n") + to_json(shard))
                has_entries = True

        stream.write("\n]}\n")


def _write_lengths(file: Path, out: Path, names: Sequence[str], split: str, documents: int) -> None:
    """Stream the lengths.npy of a split: tokens per document, int64."""
    with file.open("wb") as stream:
        # The header is written by hand, so that no array of all documents is held in memory.
        header = {"descr": "<i8", "fortran_order": False, "shape": (documents,)}
        np.lib.format.write_array_header_1_0(stream, header)

        for record in _unit_records(out, names, split):
            stream.write(np.load(out / split / record["name"] / LENGTHS_FILE).tobytes())


def sync_filesystem(out: Path) -> None:
    """Flush all files below ``out`` to disk at once."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        # syncfs flushes only the file system of ``out``; os.sync flushes all of them.
        if sys.platform != "linux" or ctypes.CDLL(None).syncfs(descriptor):
            os.sync()
    finally:
        os.close(descriptor)


def file_hashes(out: Path) -> dict[str, str]:
    """SHA-256 by name of the tokenizer's files and of the files over all units."""
    files = [out / split / name for split in SPLITS for name in (INDEX_FILE, LENGTHS_FILE)]
    files += [out / STATISTICS_FILE, *(out / TOKENIZER_DIR).iterdir()]
    return {file.relative_to(out).as_posix(): sha256_of(file) for file in files if file.is_file()}


def read_manifest_if_finished(out: Path) -> dict[str, Any] | None:
    """Read the manifest, or return None if the folder is unfinished."""
    file = out / MANIFEST
    return json.loads(file.read_text()) if file.is_file() else None
