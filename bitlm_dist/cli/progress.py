"""Progress bars, the loss chart, and text output as it is generated."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:  # `bitlm prep` needs no torch, which takes seconds to import
    from torch import Tensor

# Where the output is not a terminal, a line every so many steps, or seconds if there are no steps.
PLAIN_LOG_STEPS = 50
PLAIN_LOG_SECONDS = 10.0


@contextmanager
def training_progress(
    console: Console, start_step: int, num_steps: int
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show the progress of training: a bar on a terminal, otherwise a line now and then.

    Two rates are shown: tokens per second counts all positions, as memory and FLOPs do; predicted
    tokens are those that the model learns from.

    Yields:
        A function to call with the metrics of each step.
    """
    if not console.is_terminal:

        def print_metrics(metrics: Mapping[str, Any]) -> None:
            if metrics["step"] % PLAIN_LOG_STEPS == 0 or metrics["step"] == num_steps:
                text = "step {step}/{steps}  loss {loss:.4f}  grad norm {grad_norm:.3f}  "
                text += "{tokens_per_second:,.0f} tokens/s, "
                text += "{predicted_tokens_per_second:,.0f} of them predicted"
                console.print(text.format(steps=num_steps, **metrics), soft_wrap=True)

        yield print_metrics
        return

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s, {task.fields[predicted]:,.0f} predicted"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        # there is no loss or rate to show before the first step
        task = bar.add_task(
            "train",
            total=num_steps,
            completed=start_step,
            loss=float("nan"),
            rate=0.0,
            predicted=0.0,
        )

        def update(metrics: Mapping[str, Any]) -> None:
            rates = {
                "rate": metrics["tokens_per_second"],
                "predicted": metrics["predicted_tokens_per_second"],
            }
            bar.update(task, completed=metrics["step"], loss=metrics["loss"], **rates)

        yield update


def loss_chart(losses: Sequence[float], width: int = 60, height: int = 8) -> str:
    """Draw the loss of a run over its steps as text.

    Args:
        losses: loss of every step; non-finite ones are skipped.
        width: maximum number of columns; each is the mean of its steps.
        height: number of rows.

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
    return "\n".join([*rows, axis, steps])


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


class TextStream:
    """Prints text as it grows; a character with incomplete bytes waits for the next block."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: str) -> None:
        self._decode = decode
        self._num_shown = 0
        sys.stdout.write(prompt)

    def show(self, ids: Sequence[int]) -> None:
        """Print the text that is new in ``ids``, which are all new tokens so far."""
        # incomplete bytes at the end decode to replacement characters
        text = self._decode(ids)
        text = text.rstrip("\ufffd")
        sys.stdout.write(text[self._num_shown :])
        sys.stdout.flush()
        self._num_shown = max(self._num_shown, len(text))


class BitWatcher:
    """Prints a row of bits per head pass, in groups by token: bright if certain, dim if open."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, step: int, denoised: "Tensor") -> None:
        """Print the estimate A0_hat [1, M, K] of one head pass."""
        row = Text(f"\n{step:3d}  " if step == 1 else f"{step:3d}  ", style="dim")
        for token in denoised[0].tolist():
            for value in token:
                style = "bold green" if value > 0.5 else "bold red" if value < -0.5 else "dim"
                row.append("1" if value > 0.5 else "0" if value < -0.5 else "·", style=style)
            row.append("  ")

        self._console.print(row)
