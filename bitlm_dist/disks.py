"""Checks for free disk space before it is needed, with messages that name the remedy.

Shared memory needs the check most: a process that writes to a page which a full /dev/shm cannot
provide is killed by SIGBUS without a message.
"""

import os
import shutil
import tempfile
from pathlib import Path

from bitlm_dist.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
MIN_FREE_BYTES = 2**20  # needed by every process, there and in the folder for temporary files
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def format_bytes(size: int) -> str:
    """Format a size with a unit, to three significant digits."""
    scale, unit = next(
        ((scale, unit) for scale, unit in _UNITS if abs(size) >= scale), (1, "bytes")
    )
    return f"{size / scale:,.3g} {unit}"


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the disk of a path, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def try_to_write(folder: Path) -> None:
    """Write a page to a folder, and leave nothing behind.

    Raises:
        OSError: it cannot be written, or its disk is full.
    """
    # Allocating a page finds quotas and full disks, which the statistics may not show.
    with tempfile.TemporaryFile(dir=folder) as probe:
        os.posix_fallocate(probe.fileno(), 0, 1)


def write_problem(folder: Path, num_bytes: int) -> str:
    """Describe what prevents this process from writing ``num_bytes`` into a folder.

    Returns:
        An empty string if nothing does.
    """
    try:
        free = free_bytes(folder)
        try_to_write(folder)
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"

    return (
        f"{folder} has {format_bytes(free)} free, and {format_bytes(num_bytes)} are needed"
        if free < num_bytes
        else ""
    )


def shared_memory_problem(num_bytes: int = MIN_FREE_BYTES) -> str:
    """Describe a shortage of shared memory and the remedy; empty if there is none."""
    problem = write_problem(SHARED_MEMORY, num_bytes)
    return (
        f"shared memory: {problem}: mount it larger, "
        "or start the container with a larger --shm-size"
        if problem
        else ""
    )


def temp_dir_problem(num_bytes: int = MIN_FREE_BYTES) -> str:
    """Describe a shortage in the folder for temporary files and the remedy; empty if none."""
    # tempfile silently skips a TMPDIR that it cannot write to, so TMPDIR itself is checked
    tmpdir = os.environ.get("TMPDIR")
    try:
        folder = Path(tmpdir or tempfile.gettempdir())
    except FileNotFoundError as error:
        return f"temporary files: {error.strerror}: set TMPDIR to a folder with room"

    problem = write_problem(folder, num_bytes)
    return (
        f"temporary files: {problem}: make room, or set TMPDIR to another folder" if problem else ""
    )


def check_shared_memory(num_bytes: int, what: str) -> None:
    """Check for free shared memory before work that needs it.

    Args:
        num_bytes: bytes that this process will use.
        what: the work, for the message.

    Raises:
        UserError: names the bytes needed, the bytes free and the remedy.
    """
    if problem := shared_memory_problem(max(num_bytes, MIN_FREE_BYTES)):
        raise UserError(f"{what} needs {problem}")


def check_temp_dir(num_bytes: int, what: str) -> None:
    """Like :func:`check_shared_memory`, for the folder for temporary files."""

    if problem := temp_dir_problem(max(num_bytes, MIN_FREE_BYTES)):
        raise UserError(f"{what} needs {problem}")
