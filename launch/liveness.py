"""Whether something trains a run now, as far as its files tell."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from bitlm_dist.files import try_lock
from bitlm_dist.launch.attempts import LAUNCH, Attempt, attempt_folder

LAUNCHER_LOCK = "lock"  # in the launch folder; held by `bitlm launch local` while it runs


def is_launcher_alive(run: Path) -> bool:
    """True if a `bitlm launch local` on this machine holds the run."""
    try:
        with (run / LAUNCH / LAUNCHER_LOCK).open("r") as lock:
            return not try_lock(lock)
    except OSError:
        return False


def silent_seconds(run: Path, attempt: Attempt) -> float:
    """Seconds since the last heartbeat of any rank of an attempt, or since its start."""
    beats = (attempt_folder(run, attempt.number) / "beats").glob("rank-*")
    newest = max((beat.stat().st_mtime for beat in beats), default=attempt.began)
    return time.time() - newest


def is_running(run: Path, attempts: Sequence[Attempt]) -> bool:
    """True if a launcher without batch system trains a run, on this machine or another one.

    Args:
        run: the run folder.
        attempts: its attempts, oldest first.
    """
    if is_launcher_alive(run):
        return True

    # a lock may not be seen from another machine; its heartbeats are
    last = attempts[-1] if attempts else None
    return (
        last is not None
        and not last.outcome
        and last.nodes != (os.uname().nodename,)
        and silent_seconds(run, last) < last.limits.heartbeat_timeout
    )
