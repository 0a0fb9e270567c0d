"""Requests to stop a run: SIGTERM, SIGINT, SIGUSR2, or a stop file.

The file is ``stop`` in the run folder, or the launcher's. The training loop polls for requests with
every step; an evaluation and, in a job of one process, a slow data source are interrupted.
"""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread, get_ident, main_thread
from types import FrameType, TracebackType
from typing import Any

from bitlm_dist.launch.attempts import STOP_FILE_REASON

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
STOP_FILE = "stop"
_STOP_FILE_CODE = 1000  # larger than any signal's number
POLL_SECONDS = (1.0, 5.0)  # between checks for the file, on rank 0 and on other ranks


class StopRequested(BaseException):
    """A stop was requested inside :meth:`StopMonitor.interruptible`.

    Derives from BaseException so that ``except Exception`` blocks do not swallow it.
    """


class StopMonitor:
    """A context manager that listens for requests to stop while it is open.

    Outside the main thread it leaves signals to their owner, and watches the files only.

    Args:
        files: Stop files; the existence of any of them is a request.
        rank: This process's rank.

    Attributes:
        code: The first request's code, a signal's number or that of stop files; 0: none came.
    """

    def __init__(self, files: Sequence[Path], rank: int) -> None:
        self._files = files
        self._poll_seconds = POLL_SECONDS[min(rank, 1)]
        self.code = 0
        self._is_interruptible = False
        self._previous_handlers: dict[signal.Signals, Any] = {}
        self._done = Event()
        self._watcher = Thread(target=self._watch_files, daemon=True, name="stop file")

    def __enter__(self) -> "StopMonitor":
        # Python allows only the main thread to set handlers.
        if get_ident() == main_thread().ident:
            self._previous_handlers = {
                number: signal.signal(number, self._handle_signal) for number in STOP_SIGNALS
            }
        self._watcher.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        # Before the handlers go: the watcher's own signal would kill the process without them.
        self._watcher.join()
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Restore the signal handlers that were set before."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def die_by_signal(self) -> None:
        """Die by the signal that was received; return if there was none."""
        time.sleep(0)  # lets Python handle a signal that arrived inside torch
        if self.code in STOP_SIGNALS:
            self.restore_handlers()
            signal.raise_signal(signal.Signals(self.code))

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context in which a request raises :class:`StopRequested` in the main thread.

        The body must not contain anything that has to be completed.
        """
        self._is_interruptible = True
        try:
            # A request may have come before the context was entered.
            if self.code:
                raise StopRequested
            yield
        finally:
            self._is_interruptible = False

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        self.code = self.code or number
        if self._is_interruptible:
            self._is_interruptible = False  # raise once: a second signal must not break the cleanup
            raise StopRequested

    def _watch_files(self) -> None:
        """Turn a stop file into a signal, which wakes the main thread from any wait."""
        while not self._any_file_exists():
            if self._done.wait(self._poll_seconds):
                return

        # The code is set before the signal is sent, so that it names the file and not the signal.
        self.code = self.code or _STOP_FILE_CODE
        if self._previous_handlers:
            signal.pthread_kill(main_thread().ident or 0, signal.SIGUSR2)

    def _any_file_exists(self) -> bool:
        try:
            return any(file.exists() for file in self._files)
        except OSError:  # the file system may be unavailable for a moment
            return False


def stop_reason(code: int) -> str | None:
    """The origin of a request: a signal's name, or the stop file; None if there was no request.

    Args:
        code: :attr:`StopMonitor.code`.
    """
    if not code:
        return None
    return STOP_FILE_REASON if code == _STOP_FILE_CODE else signal.Signals(code).name
