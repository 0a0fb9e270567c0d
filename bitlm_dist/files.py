"""Files that are whole or absent, and the JSON in them."""

import errno
import fcntl
import hashlib
import json
import os
from math import isfinite
from pathlib import Path
from typing import IO, Any, TextIO

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(file: Path, text: str) -> None:
    """Write ``text`` beside ``file``, flush it to disk, and rename it into place; parent folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)
    sync_folder(file.parent)


def to_json(value: Any, **layout: Any) -> str:
    """JSON that strict readers take, where Python would write NaN and Infinity, which are no JSON.

    A number that is not finite becomes null, and the object gets a key ``not_finite`` with the names of all that did, e.g.
    ``["loss", "sides.bits.mfu"]``. In a list of objects each has its own.

    Args:
        value: dicts, lists, strings, numbers, booleans and None.
        layout: how ``json.dumps`` is to write it: ``indent``, ``separators``, ``sort_keys``.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        flagged = [_flagged(entry) for entry in value] if isinstance(value, list) else _flagged(value)
        return json.dumps(flagged, allow_nan=False, **layout)


def _flagged(value: Any) -> Any:
    found: list[str] = []
    finite = _finite(value, "", found)
    return {**finite, "not_finite": found} if found and isinstance(finite, dict) else finite


def _finite(value: Any, name: str, found: list[str]) -> Any:
    """``value`` with None for numbers that are not finite, whose names are added to ``found``."""
    if isinstance(value, dict):
        return {key: _finite(inner, f"{name}.{key}" if name else str(key), found) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner, f"{name}.{i}" if name else str(i), found) for i, inner in enumerate(value)]
    if isinstance(value, float) and not isfinite(value):
        found.append(name)
        return None
    return value


def sha256_of(file: Path) -> str:
    """Hash of a file's bytes, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def locked(file: Path, owner: str) -> TextIO | None:
    """Lock a file and write into it who holds it.

    Args:
        file: need not exist.
        owner: what takes the place of its content.

    Returns:
        The open file, which holds the lock until it is closed; None if another process holds it.
    """
    lock = file.open("a+")
    if not try_lock(lock):
        lock.close()
        return None
    lock.truncate(0)
    lock.write(owner)
    lock.flush()
    return lock


def try_lock(stream: IO[Any] | int) -> bool:
    """Lock an open file, or a folder's descriptor, until it is closed -> whether no other process has it.

    A file system without locks is as good as one where nobody else has any.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power cut; where the file system cannot, it is as it is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder``, and itself."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)
