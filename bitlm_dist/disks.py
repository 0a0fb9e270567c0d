"""Room on disks, looked for before it is needed: how much is free, how much will be, and what to set.

Shared memory deserves it most: a process that writes to pages which a full /dev/shm cannot give dies of SIGBUS without a word.
"""

import os
import shutil
import tempfile
from pathlib import Path

from bitlm_dist.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
LITTLE = 2**20  # bytes that every process needs of it, and of the folder for temporary files
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def in_words(size: int) -> str:
    """Bytes as a number with a unit, to three digits."""
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if abs(size) >= scale), (1, "bytes"))
    return f"{size / scale:,.3g} {unit}"


def free_bytes(path: Path) -> int:
    """What this user may still write on the disk that holds a path, or will hold it."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def problem_of(folder: Path, needed: int) -> str:
    """Say what keeps this process from writing so many bytes into a folder; empty: nothing."""
    try:
        free = free_bytes(folder)
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, 1)  # a page, which a quota or a full disk does not give
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"
    return f"{folder} has {in_words(free)} free, and {in_words(needed)} are needed" if free < needed else ""


def shared_memory_problem(needed: int = LITTLE) -> str:
    """Say what is wrong with /dev/shm, and what to do; empty: nothing."""
    problem = problem_of(SHARED_MEMORY, needed)
    return f"shared memory: {problem}: mount it larger, or start the container with a larger --shm-size" if problem else ""


def temporary_problem(needed: int = LITTLE) -> str:
    """Say what is wrong with the folder for temporary files, and what to do; empty: nothing."""
    named = os.environ.get("TMPDIR")
    try:  # Python passes over a TMPDIR that it cannot write, without a word
        folder = Path(named or tempfile.gettempdir())
    except FileNotFoundError as error:
        return f"temporary files: {error.strerror}: set TMPDIR to a folder with room"
    problem = problem_of(folder, needed)
    return f"temporary files: {problem}: make room, or set TMPDIR to another folder" if problem else ""


def check_shared_memory(needed: int, what: str) -> None:
    """Refuse to begin what /dev/shm has no room for.

    Args:
        needed: bytes of this process.
        what: needs them.

    Raises:
        UserError: says what is needed, what is free, and what to do.
    """
    if problem := shared_memory_problem(max(needed, LITTLE)):
        raise UserError(f"{what} needs {problem}")


def check_temporary(needed: int, what: str) -> None:
    """As :func:`check_shared_memory`, for the folder for temporary files."""
    if problem := temporary_problem(max(needed, LITTLE)):
        raise UserError(f"{what} needs {problem}")
