"""Progress of `bitlm prep`: a bar per phase on a terminal, otherwise a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bitlm_dist.cli.progress import PLAIN_LOG_SECONDS


class PreparationStatus(Protocol):
    """Progress of a preparation, see :class:`bitlm_dist.data_prep.prepare.Progress`."""

    @property
    def phase(self) -> str:
        """Name of the current phase."""
        ...

    @property
    def done(self) -> int:
        """Bytes of the corpus, as stored, that were read."""
        ...

    @property
    def total(self) -> int:
        """Bytes of the corpus, as stored; 0 if unknown."""
        ...

    @property
    def text_bytes(self) -> int:
        """Bytes of text so far."""
        ...

    @property
    def num_documents(self) -> int:
        """Documents read so far."""
        ...


@contextmanager
def preparation_progress(console: Console) -> Iterator[Callable[[PreparationStatus], None]]:
    """Show the progress of a preparation: a bar on a terminal, otherwise a line now and then.

    Yields:
        A function to call with every update of the progress.
    """
    rate = _preparation_rate()
    if not console.is_terminal:
        yield _plain_preparation_log(console, rate)
        return

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        TextColumn("{task.fields[rate]:.1f} MB/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def update(progress: PreparationStatus) -> None:
            # a bar per phase, as each has a total of its own
            if progress.phase not in tasks:
                tasks[progress.phase] = bar.add_task(
                    progress.phase, total=progress.total or None, documents=0, rate=0.0
                )
            bar.update(
                tasks[progress.phase],
                completed=progress.done,
                documents=progress.num_documents,
                rate=rate(progress),
            )

        yield update


def _preparation_rate() -> Callable[[PreparationStatus], float]:
    """Make a function that returns the MB of text per second of the current phase."""
    phase_starts: dict[str, float] = {}
    start_time = time.perf_counter()

    def rate(progress: PreparationStatus) -> float:
        # the first phase began before its first update
        phase_start = phase_starts.setdefault(
            progress.phase, start_time if not phase_starts else time.perf_counter()
        )
        return progress.text_bytes / 1e6 / max(time.perf_counter() - phase_start, 1e-3)

    return rate


def _plain_preparation_log(
    console: Console, rate: Callable[[PreparationStatus], float]
) -> Callable[[PreparationStatus], None]:
    """Make a function that prints a line if the last one was some time ago."""
    last = time.perf_counter()

    def print_status(progress: PreparationStatus) -> None:
        nonlocal last
        speed = rate(progress)  # on every call, as it notes when phases begin
        if time.perf_counter() - last < PLAIN_LOG_SECONDS:
            return

        last = time.perf_counter()
        percent = f"{100 * progress.done / progress.total:.0f}%  " if progress.total else ""
        text = f"{progress.phase}  {percent}{progress.num_documents:,} documents  "
        text += f"{progress.text_bytes / 1e6:,.1f} MB of text  {speed:.1f} MB/s"
        console.print(text, soft_wrap=True, markup=False)

    return print_status
