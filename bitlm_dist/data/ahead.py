"""The next batch is read while the current one is computed."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")
PATIENCE = 10.0  # seconds that a read which nobody needs any more may take


class Ahead(Generic[T]):
    """Values of a function of the step, each begun when the one before it is handed out.

    Args:
        fetch: called by one thread at a time, which ends with the process, however long a read may hang.
    """

    def __init__(self, fetch: Callable[[int], T]) -> None:
        self._fetch = fetch
        self._step: int | None = None
        self._coming: Future[T] = Future()
        self._thread: Thread | None = None

    def ask(self, step: int) -> None:
        """Begin the value of a step, unless that is done."""
        if step != self._step:
            self._begin(step)

    def wait(self) -> None:
        """Until the value asked for is there; may be interrupted and called again.

        Raises:
            Exception: what ``fetch`` raised.
        """
        self._coming.result()

    def take(self) -> T:
        """The value asked for; begins the next one."""
        assert self._step is not None, "nothing was asked for"
        value = self._coming.result()
        self._begin(self._step + 1)
        return value

    def _begin(self, step: int) -> None:
        if self._thread is not None:
            self._thread.join()
        self._step, self._coming = step, Future()
        self._thread = Thread(target=self._run, args=(step, self._coming), daemon=True, name="data")
        self._thread.start()

    def _run(self, step: int, coming: "Future[T]") -> None:
        try:
            coming.set_result(self._fetch(step))
        except BaseException as error:
            coming.set_exception(error)

    def close(self) -> bool:
        """Let the read in flight end -> whether it did."""
        if self._thread is not None:
            self._thread.join(PATIENCE)
            return not self._thread.is_alive()
        return True
