"""Whether something trains a run now, as far as its files tell."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from bitlm_dist.errors import UserError
from bitlm_dist.files import try_lock
from bitlm_dist.launch.attempts import LAUNCH, Attempt, last_sign_of_life

LAUNCHER_LOCK = "lock"  # in the launch folder; held by `bitlm launch local` while it runs


def is_launcher_alive(run: Path) -> bool:
    """True if a `bitlm launch local` on this machine holds the run."""
    file = run / LAUNCH / LAUNCHER_LOCK
    try:
        # NFS locks only files that are open for writing
        with file.open("r+" if os.access(file, os.W_OK) else "r") as lock:
            return not try_lock(lock)
    except OSError:
        return False


def being_trained_error(run: Path) -> UserError:
    """The error of a second `bitlm launch local` of a run."""
    return UserError(
        f"run.dir = {run} is being trained by another `bitlm launch local`: wait for it or end it"
    )


def silent_seconds(run: Path, attempt: Attempt) -> float:
    """Seconds since the latest heartbeat or output of an attempt's ranks, or since its start."""
    return time.time() - last_sign_of_life(run, attempt)


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
