"""Prefetching: the next batch is read while the current one is computed."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")
CLOSE_TIMEOUT = 10.0  # seconds to wait for a pending read whose result is no longer needed


class Prefetcher(Generic[T]):
    """Evaluates a function of the step one step ahead, in a thread.

    Args:
        fetch: function from the step to a value. It is called by one thread at a time, a daemon: a
            read that hangs cannot keep the process alive.
    """

    def __init__(self, fetch: Callable[[int], T]) -> None:
        self._fetch = fetch
        self._step: int | None = None
        self._future: Future[T] = Future()
        self._thread: Thread | None = None

    def start(self, step: int) -> None:
        """Start fetching the value of a step. A no-op if it has been started already."""
        if step != self._step:
            self._start_fetch(step)

    def wait(self) -> None:
        """Wait for the value that was started. May be interrupted and called again.

        Raises:
            Exception: Any exception that ``fetch`` raised.
        """
        self._future.result()

    def get(self) -> T:
        """Return the value that was started, and start fetching the next one."""
        assert self._step is not None, "start() must be called first"
        value = self._future.result()
        self._start_fetch(self._step + 1)
        return value

    def _start_fetch(self, step: int) -> None:
        # An earlier fetch may still be running if start() jumps to another step.
        if self._thread is not None:
            self._thread.join()

        self._step = step
        self._future = Future()
        self._thread = Thread(target=self._run, args=(step, self._future), daemon=True, name="data")
        self._thread.start()

    def _run(self, step: int, future: "Future[T]") -> None:
        try:
            future.set_result(self._fetch(step))
        except BaseException as error:
            # Everything, or wait() would never return.
            future.set_exception(error)

    def close(self) -> bool:
        """Wait for the pending read, for at most ``CLOSE_TIMEOUT``.

        Returns:
            True if it finished in time.
        """
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT)
            return not self._thread.is_alive()
        return True
