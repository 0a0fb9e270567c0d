"""Progress bars and the loss chart."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bitlm_dist.cli.console import stderr_console
from bitlm_dist.formatting import format_time

# Where the output is not a terminal, a line every so many seconds.
PLAIN_LOG_SECONDS = 30.0


@contextmanager
def work_progress(
    what: str, total: int | None = None, unit: str = "", *, animated: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show on standard error that a command works, and how far it is.

    On a terminal a bar, or a spinner without a total, which is gone when the work is done.
    Elsewhere a line every 30 seconds, so that short work prints nothing.

    Args:
        what: the work, e.g. "evaluating".
        total: how much there is to do.
        unit: of ``total``, e.g. "sequences".
        animated: draw ten times per second; else only when something was done, so that no thread
            runs beside a measurement.

    Yields:
        A function to call with how much is done; it may be called from another thread.
    """
    if not stderr_console.is_interactive:
        yield _plain_work_log(what, total, unit)
        return

    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        *([BarColumn(), MofNCompleteColumn(), TextColumn(unit)] if total else []),
        TimeElapsedColumn(),
        *([TextColumn("left"), TimeRemainingColumn()] if total else []),
    ]
    with Progress(*columns, console=stderr_console, transient=True, auto_refresh=animated) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done, refresh=not animated)


def _plain_work_log(what: str, total: int | None, unit: str) -> Callable[[int], None]:
    """Make a function that prints a line if the last one was some time ago."""
    last = time.monotonic()

    def print_status(done: int) -> None:
        nonlocal last
        if time.monotonic() - last < PLAIN_LOG_SECONDS:
            return
        last = time.monotonic()
        of_total = f" of {total:,}" if total else ""
        text = f"{format_time()} {what}: {done:,}{of_total} {unit}".rstrip()
        stderr_console.print(text, soft_wrap=True, markup=False)

    return print_status


def loss_chart(losses: Sequence[float], width: int = 60, height: int = 8, title: str = "") -> str:
    """Draw the loss of a run over its steps as text.

    Args:
        losses: loss of every step; non-finite ones are skipped.
        width: maximum number of columns; each is the mean of its steps.
        height: number of rows.
        title: first line, if any.

    Returns:
        The lines of the chart; empty if fewer than two losses are finite.
    """
    finite = [loss for loss in losses if isfinite(loss)]
    if len(finite) < 2:
        return ""

    # Columns without a finite loss repeat the one before.
    width = min(width, len(losses))
    columns: list[float] = []
    for column in range(width):
        first = column * len(losses) // width
        end = (column + 1) * len(losses) // width
        inside = [loss for loss in losses[first:end] if isfinite(loss)]
        columns.append(
            sum(inside) / len(inside) if inside else (columns or finite)[-1 if columns else 0]
        )

    # Each row has eight levels, one per partial block character; the lowest column shows one level.
    low = min(columns)
    high = max(columns)
    levels = [1 + round((loss - low) / (high - low or 1.0) * (8 * height - 1)) for loss in columns]

    rows = []
    for row in reversed(range(height)):
        label = {height - 1: f"{high:.3f}", 0: f"{low:.3f}"}.get(row, "")
        rows.append(
            f"{label:>9} ┤"
            + "".join(" ▁▂▃▄▅▆▇█"[max(0, min(8, level - 8 * row))] for level in levels)
        )

    axis = f"{'loss':>9} └" + "─" * width
    steps = f"{'':>11}1{len(losses):>{max(width - 1, 1)},}"
    return "\n".join([*([title] if title else []), *rows, axis, steps])
