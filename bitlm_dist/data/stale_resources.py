"""Owner tags for temporary folders and shared memory, and cleanup after processes that died.

A process that is killed leaves both behind. The tag holds host, PID namespace, PID and start time
of the owner. So a reused PID, another container, or another host that shares the folder is not
mistaken for it.
"""

import os
import platform
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from bitlm_dist.disks import SHARED_MEMORY

OWNER_PREFIX = "bitlm-"
_OWNER = re.compile(re.escape(OWNER_PREFIX) + r"(?P<host>[\w.]+)-(?P<pid>\d+)-(?P<start_time>\d+)-")


def _start_time(pid: int) -> int | None:
    """Return the start time of a process in clock ticks since boot, or None if it is gone."""
    try:
        # Split behind the last ")": the process name in parentheses may hold any character.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()

        # A zombie only waits for its parent and owns nothing any more.
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _host_and_namespace() -> str:
    """Return a name for this host and PID namespace."""
    host = re.sub(r"[^\w.]", "_", platform.node())[:64]
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{host}.{re.sub(r'[^0-9]', '', namespace)}"


def owner_tagged_name(name: str) -> str:
    """Tag ``name`` with this process as its owner."""
    pid = os.getpid()
    return f"{OWNER_PREFIX}{_host_and_namespace()}-{pid}-{_start_time(pid) or 0}-{name}"


def is_stale(name: str) -> bool:
    """Return True if ``name`` has an owner tag of this host and PID namespace, and the owner died.

    See :func:`owner_tagged_name`.
    """
    match = _OWNER.match(name)
    if match is None or match["host"] != _host_and_namespace():
        return False
    return _start_time(int(match["pid"])) != int(match["start_time"])


def remove_stale_resources(temporary: Path | None = None) -> list[Path]:
    """Remove the temporary folders and shared memory of dead owners.

    Args:
        temporary: folder to search for temporary folders; None: the system's.

    Returns:
        The paths that were removed.
    """
    removed = []
    for folder in (temporary or Path(tempfile.gettempdir()), SHARED_MEMORY):
        # Another process that is starting may be removing the same paths.
        with suppress(OSError):
            for path in [path for path in folder.iterdir() if is_stale(path.name)]:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
                removed.append(path)
    return removed
