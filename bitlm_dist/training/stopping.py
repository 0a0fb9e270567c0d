"""What asks a run to stop: SIGTERM, SIGINT and SIGUSR2, or a file: ``stop`` in the run folder, or its launcher's.

Between two steps the loop asks; in the long waits between them (an evaluation, data that does not come) the request breaks in.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread, get_ident, main_thread
from types import FrameType, TracebackType
from typing import Any

from bitlm_dist.launch.attempts import STOP_REQUEST

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
STOP_FILE = "stop"
_BY_FILE = 1000  # beyond all signals
POLL = (1.0, 5.0)  # seconds between looks at the file, of rank 0 and of the others


class Interrupted(BaseException):
    """A stop was asked for inside :meth:`StopRequests.interruptible`; no Exception, so that nothing on its way takes it for one."""


class StopRequests:
    """Listens while open; a context manager. Outside the main thread signals are their owner's, and only the file counts.

    Args:
        files: any of which asks to stop by being there.
        rank: of this process.
    """

    def __init__(self, files: Sequence[Path], rank: int) -> None:
        self._files, self._poll = files, POLL[min(rank, 1)]
        self.code = 0  # of the request: a signal's number
        self._break_in = False
        self._old: dict[signal.Signals, Any] = {}
        self._done, self._watcher = Event(), Thread(target=self._watch, daemon=True, name="stop file")

    def __enter__(self) -> "StopRequests":
        if get_ident() == main_thread().ident:
            self._old = {number: signal.signal(number, self._catch) for number in SIGNALS}
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._watcher.join()  # or its signal could come when nobody catches it
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """While open, a request raises :class:`Interrupted` in the main thread; nothing that must be finished may be in it."""
        self._break_in = True
        try:
            if self.code:
                raise Interrupted
            yield
        finally:
            self._break_in = False

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.code = self.code or number
        if self._break_in:
            self._break_in = False  # once
            raise Interrupted

    def _watch(self) -> None:
        """Turn a file into a signal, which wakes the main thread from what it waits for."""
        while not self._found():
            if self._done.wait(self._poll):
                return
        self.code = self.code or _BY_FILE
        if self._old:
            signal.pthread_kill(main_thread().ident or 0, signal.SIGUSR2)

    def _found(self) -> bool:
        try:
            return any(file.exists() for file in self._files)
        except OSError:  # the file system is away for a moment
            return False


def name_of(code: int) -> str | None:
    """What asked to stop, from :attr:`StopRequests.code`: a signal's name or the file; None: nothing has."""
    if not code:
        return None
    return STOP_REQUEST if code == _BY_FILE else signal.Signals(code).name
