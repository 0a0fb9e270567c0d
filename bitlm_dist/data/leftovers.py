"""Names that say which process owns a temporary folder or a piece of shared memory, so that those of dead owners can be removed.

A process that is killed leaves both behind. Its name for them holds host, process namespace, process id and the time it started: a
number that is in use again, another container or another host that shares the folder is not taken for it.
"""

import os
import platform
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from bitlm_dist.disks import SHARED_MEMORY

PREFIX = "bitlm-"
_OWNER = re.compile(re.escape(PREFIX) + r"(?P<place>[\w.]+)-(?P<process>\d+)-(?P<started>\d+)-")


def _started(process: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None: it is gone."""
    try:
        # the name in parentheses may hold anything
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])  # a zombie waits for its parent, and has nothing any more
    except (OSError, IndexError, ValueError):
        return None


def _place() -> str:
    """This machine and process namespace."""
    host = re.sub(r"[^\w.]", "_", platform.node())[:64]
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{host}.{re.sub(r'[^0-9]', '', namespace)}"


def owned_name(name: str) -> str:
    """``name`` as this process's own."""
    process = os.getpid()
    return f"{PREFIX}{_place()}-{process}-{_started(process) or 0}-{name}"


def is_left_over(name: str) -> bool:
    """Whether a process of this machine and namespace that is gone had this name made by :func:`owned_name`."""
    found = _OWNER.match(name)
    if found is None or found["place"] != _place():
        return False
    return _started(int(found["process"])) != int(found["started"])


def remove_leftovers(temporary: Path | None = None) -> list[Path]:
    """Remove the temporary folders and shared memory of dead owners -> what was removed.

    Args:
        temporary: where to look for folders; None: the folder for temporary files.
    """
    removed = []
    for folder in (temporary or Path(tempfile.gettempdir()), SHARED_MEMORY):
        with suppress(OSError):  # another start may be removing the same
            for path in [path for path in folder.iterdir() if is_left_over(path.name)]:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
                removed.append(path)
    return removed
