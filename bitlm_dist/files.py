"""Files that are either complete or absent, and file locks."""

import errno
import fcntl
import hashlib
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TextIO

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file so that it is complete or absent at any time, even after a power failure.

    The content is written to a temporary file, flushed to disk and renamed into place. Parent
    folders are created. If it cannot be written, an old file stays and nothing is left beside it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(file)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        # the user knows the file, not its temporary name; a write to a full disk names no file
        if isinstance(error, OSError):
            error.filename = os.fspath(file)
            error.filename2 = None
        raise

    fsync_folder(file.parent)


def save_npz(file: Path, **arrays: Any) -> None:
    """Write arrays as an .npz file."""
    import numpy as np  # here, as the command line starts without it

    # In memory first: zipfile complains a second time when it meets a full disk.
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    file.write_bytes(stream.getvalue())


def missing_folders(path: Path) -> list[Path]:
    """The folders that must be made for ``path`` to be one, the innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def remove_empty_folders(folders: list[Path]) -> None:
    """Remove folders as far as they are empty; those that were never made are passed over."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def sha256_of(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_locked(file: Path, owner: str) -> TextIO | None:
    """Lock a file and write the owner of the lock into it.

    Args:
        file: the lock file; created if it does not exist.
        owner: text that replaces the content.

    Returns:
        The open file, which holds the lock until it is closed; None if another process holds it.
    """
    # "a+" keeps the name of another owner until the lock is ours
    lock = file.open("a+")
    if not try_lock(lock):
        lock.close()
        return None

    lock.truncate(0)
    lock.write(owner)
    lock.flush()
    return lock


def try_lock(stream: IO[Any] | int) -> bool:
    """Try to lock an open file, or the descriptor of a folder, until it is closed.

    On a file system without locks every attempt succeeds.

    Returns:
        False if another process holds the lock.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    return True


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power failure.

    A no-op on file systems that do not support it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush ``folder`` and every file and folder below it to disk."""

    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        elif path.is_dir():
            fsync_folder(path)
    fsync_folder(folder)
