"""Failures that a full disk explains: they end as soon as the user has made room."""

import re
from contextlib import suppress
from pathlib import Path

from bitlm_dist.disks import MIN_FREE_BYTES, free_bytes

_SIGNS = ("no space left", "quota exceeded", "quota is used up", "has no room for")
_ON_SOME_DISK = "make room on that disk"  # of bitlm_dist.errors, which does not look for it
_PATH = re.compile(  # as bitlm_dist.errors and Python itself say which path met a full disk
    r"(?<!\S)(?P<before>/[^:;'\"]*): (no space left|disk quota exceeded)"
    r"|(no space left on device|disk quota exceeded): ['\"](?P<after>/[^'\"]*)",
    re.IGNORECASE,
)
_REMEDY = re.compile(r"make room on (/[^;,]*)")


def with_disk_hint(run: Path, reason: str) -> str:
    """Name the disk on which to make room in the reason of a failure, if a full disk is the cause.

    It is the disk of the path in the reason, such as a cache of the data; else that of the
    checkpoints or of the run. A rank that cannot write its log has no words either, so these two
    are looked at, too.

    Args:
        run: the run folder.
        reason: why the attempt failed.
    """
    is_full = any(sign in reason.lower() for sign in _SIGNS)
    folders = (run / "checkpoints", run)
    named = _PATH.search(reason)
    with suppress(OSError):
        if named:
            full: Path | None = Path(named["before"] or named["after"])
        else:
            full = next((f for f in folders if free_bytes(f.resolve()) < MIN_FREE_BYTES), None)
        if full is not None or is_full:
            remedy = f"make room on {_mount_point(full or folders[0])}"
            if _ON_SOME_DISK in reason:
                return reason.replace(_ON_SOME_DISK, remedy)
            return f"{reason}; {remedy}"
    return reason


def full_disk(reason: str) -> str | None:
    """The disk that is full according to the reason of a failure; None if that is not the cause."""
    match = _REMEDY.search(reason)
    return match[1] if match else None


def _mount_point(path: Path) -> Path:
    """The folder at which the disk of a path is mounted."""
    path = path.resolve()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    return path
