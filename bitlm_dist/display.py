"""What the terminal shows while something runs."""

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

if TYPE_CHECKING:  # preparing text needs no torch, which takes seconds to import
    from torch import Tensor

PLAIN_EVERY = 50  # steps between lines where the output is no terminal
PLAIN_SECONDS = 10.0  # the same where the work has no steps


@contextmanager
def training_progress(console: Console, begun: int, steps: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A bar with loss, tokens/s and time left on a terminal; a line now and then elsewhere. Yields what takes the metrics.

    Speed counts all positions, as memory and FLOPs do, and beside them the predicted tokens, from which a model learns.
    """
    if not console.is_terminal:

        def line(metrics: Mapping[str, Any]) -> None:
            if metrics["step"] % PLAIN_EVERY == 0 or metrics["step"] == steps:
                text = "step {step}/{steps}  loss {loss:.4f}  grad norm {grad_norm:.3f}  "
                text += "{tokens_per_second:,.0f} tokens/s, {predicted_tokens_per_second:,.0f} of them predicted"
                console.print(text.format(steps=steps, **metrics), soft_wrap=True)

        yield line
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
        task = bar.add_task("train", total=steps, completed=begun, loss=float("nan"), rate=0.0, predicted=0.0)

        def update(metrics: Mapping[str, Any]) -> None:
            rates = {"rate": metrics["tokens_per_second"], "predicted": metrics["predicted_tokens_per_second"]}
            bar.update(task, completed=metrics["step"], loss=metrics["loss"], **rates)

        yield update


def loss_chart(losses: Sequence[float], width: int = 60, height: int = 8) -> str:
    """A run's loss over its steps, drawn in characters.

    Args:
        losses: of each step; those that are not finite are left out.
        width: columns at most, each the mean of its steps.
        height: rows.
    """
    finite = [loss for loss in losses if isfinite(loss)]
    if len(finite) < 2:
        return ""

    # Columns without a finite loss repeat the one before.
    width = min(width, len(losses))
    columns: list[float] = []
    for column in range(width):
        first, end = column * len(losses) // width, (column + 1) * len(losses) // width
        inside = [loss for loss in losses[first:end] if isfinite(loss)]
        columns.append(sum(inside) / len(inside) if inside else (columns or finite)[-1 if columns else 0])

    # Each row holds eight levels, the levels of its partial blocks; the lowest column shows one of them.
    low, high = min(columns), max(columns)
    levels = [1 + round((loss - low) / (high - low or 1.0) * (8 * height - 1)) for loss in columns]
    rows = []
    for row in reversed(range(height)):
        label = {height - 1: f"{high:.3f}", 0: f"{low:.3f}"}.get(row, "")
        rows.append(f"{label:>9} ┤" + "".join(" ▁▂▃▄▅▆▇█"[max(0, min(8, level - 8 * row))] for level in levels))
    axis = f"{'loss':>9} └" + "─" * width
    steps = f"{'':>11}1{len(losses):>{max(width - 1, 1)},}"
    return "\n".join([*rows, axis, steps])


class Preparing(Protocol):
    """How far a preparation is, see :class:`bitlm_dist.data_prep.prepare.Progress`."""

    @property
    def phase(self) -> str: ...  # noqa: D102
    @property
    def done(self) -> int: ...  # noqa: D102
    @property
    def total(self) -> int: ...  # noqa: D102
    @property
    def text_bytes(self) -> int: ...  # noqa: D102
    @property
    def documents(self) -> int: ...  # noqa: D102


@contextmanager
def preparation_progress(console: Console) -> Iterator[Callable[[Preparing], None]]:
    """A bar with MB/s of text and time left on a terminal; a line now and then elsewhere. Yields what takes the progress."""
    begun: dict[str, float] = {}
    opened = time.perf_counter()

    def rate(progress: Preparing) -> float:
        began = begun.setdefault(progress.phase, opened if not begun else time.perf_counter())
        return progress.text_bytes / 1e6 / max(time.perf_counter() - began, 1e-3)

    if not console.is_terminal:
        last = opened

        def line(progress: Preparing) -> None:
            nonlocal last
            speed = rate(progress)
            if time.perf_counter() - last >= PLAIN_SECONDS:
                last = time.perf_counter()
                share = f"{100 * progress.done / progress.total:.0f}%  " if progress.total else ""
                text = f"{progress.phase}  {share}{progress.documents:,} documents  {progress.text_bytes / 1e6:,.1f} MB of text"
                console.print(f"{text}  {speed:.1f} MB/s", soft_wrap=True, markup=False)

        yield line
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

        def update(progress: Preparing) -> None:
            if progress.phase not in tasks:
                tasks[progress.phase] = bar.add_task(progress.phase, total=progress.total or None, documents=0, rate=0.0)
            bar.update(tasks[progress.phase], completed=progress.done, documents=progress.documents, rate=rate(progress))

        yield update


class TextStream:
    """Prints text as it grows; a character whose bytes are not complete yet waits for its block."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: str) -> None:
        self._decode, self._shown = decode, 0
        sys.stdout.write(prompt)

    def show(self, ids: Sequence[int]) -> None:
        """Print what ``ids``, all new tokens so far, add."""
        text = self._decode(ids)
        text = text.rstrip("\ufffd")
        sys.stdout.write(text[self._shown :])
        sys.stdout.flush()
        self._shown = max(self._shown, len(text))


class BitWatcher:
    """Prints each head pass as a row of bits, one group of cells a token: bright where certain, dim where open."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, step: int, denoised: "Tensor") -> None:
        """Show A0_hat [1, M, K] of one pass."""
        row = Text(f"\n{step:3d}  " if step == 1 else f"{step:3d}  ", style="dim")
        for token in denoised[0].tolist():
            for value in token:
                style = "bold green" if value > 0.5 else "bold red" if value < -0.5 else "dim"
                row.append("1" if value > 0.5 else "0" if value < -0.5 else "·", style=style)
            row.append("  ")
        self._console.print(row)
