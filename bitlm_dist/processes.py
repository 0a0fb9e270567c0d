"""Child processes that do not outlive their parent, and handlers of signals."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process as soon as its parent ends, for whatever reason.

    Must be the first call in the new process.

    Args:
        parent: process id of the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before the request; the kernel would never signal that.
    if os.getppid() != parent:
        sys.exit(1)


@contextmanager
def handling_signal(
    number: int, handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """While open, handle a signal by ``handler``; in the main thread only."""
    previous = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, previous)
