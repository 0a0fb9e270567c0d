"""Progress of `bitlm prep`: a bar per phase on a terminal, otherwise a line now and then."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

from bitlm_dist.cli import progress
from bitlm_dist.data_prep.progress import Progress as PreparationStatus
from bitlm_dist.data_prep.progress import ProgressCallback
from bitlm_dist.formatting import format_duration, format_time, plural

MIN_RATE_SECONDS = 1.0  # of a phase, before its rate and the time left mean anything


@contextmanager
def preparation_progress(console: Console) -> Iterator[ProgressCallback]:
    """Show the progress of a preparation: a bar on a terminal, otherwise a line now and then.

    Yields:
        A function to call when a phase begins, and with every update of the progress.
    """
    if console.is_interactive:
        with _PhaseBars(console) as bars:
            yield bars.update
    else:
        with _PhaseLog(console) as log:
            yield log.update


class _PhaseBars:
    """A bar per phase, as each has a total of its own; a spinner where the total is unknown."""

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, table_column=Column(max_width=40)),
            TextColumn("{task.fields[status]}"),
            _Times(),
        )
        self._bars = Progress(*columns, console=console)
        self._phase: str | None = None
        self._task = TaskID(0)

    def update(self, status: PreparationStatus) -> None:
        """Show ``status`` in the bar of its phase, which ends the bar of the phase before."""
        if status.phase != self._phase:
            self._end_phase()
            self._phase = status.phase
            self._task = self._bars.add_task(status.phase, total=status.total or None, status="")

        seconds = self._bars.tasks[self._task].elapsed or 0.0
        self._bars.update(
            self._task, completed=status.done, status=", ".join(_facts(status, seconds))
        )

    def _end_phase(self) -> None:
        if self._phase is not None:
            self._bars.update(self._task, total=1, completed=1)

    def __enter__(self) -> "_PhaseBars":
        self._bars.start()
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *exception: object) -> None:
        # The bar of a phase that failed stays where it was.
        if exception_type is None:
            self._end_phase()
        self._bars.stop()


class _Times(ProgressColumn):
    """Time that a phase has taken, and while it runs the time that is left if that is known."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        seconds = (task.finished_time if task.finished else task.elapsed) or 0.0
        text = format_duration(seconds)
        left = task.time_remaining
        if not task.finished and left is not None and seconds >= MIN_RATE_SECONDS:
            text += f", left {format_duration(left)}"
        return Text(text, style="progress.elapsed")


class _PhaseLog:
    """A line with the time when a phase begins, and every PLAIN_LOG_SECONDS while it lasts."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: PreparationStatus | None = None
        self._phase_start = 0.0
        self._ended = threading.Event()
        # A phase may last long without an update.
        self._thread = threading.Thread(target=self._print_regularly, daemon=True)

    def update(self, status: PreparationStatus) -> None:
        """Note ``status``, and print the name of a phase that begins."""
        if self._status is None or status.phase != self._status.phase:
            self._phase_start = time.monotonic()
            self._console.print(f"{format_time()} {status.phase}", soft_wrap=True, markup=False)
        self._status = status

    def _print_regularly(self) -> None:
        while not self._ended.wait(progress.PLAIN_LOG_SECONDS):
            if self._status is not None:
                self._print_status(self._status)

    def _print_status(self, status: PreparationStatus) -> None:
        seconds = time.monotonic() - self._phase_start
        facts = [*_facts(status, seconds), format_duration(seconds)]
        if 0 < status.done < status.total:
            facts.append(f"left {format_duration(seconds * (status.total / status.done - 1))}")
        self._console.print(
            f"{format_time()} {status.phase}: {', '.join(facts)}", soft_wrap=True, markup=False
        )

    def __enter__(self) -> "_PhaseLog":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()


def _facts(status: PreparationStatus, seconds: float) -> list[str]:
    """What is known of a phase that has taken ``seconds``; empty if that is nothing."""
    facts = [f"{100 * status.done // status.total} %"] if status.total else []
    if status.num_documents:
        facts.append(plural(status.num_documents, "document"))
    if status.text_bytes and seconds >= MIN_RATE_SECONDS:
        facts.append(f"{status.text_bytes / 1e6 / seconds:.1f} MB/s")
    return facts
