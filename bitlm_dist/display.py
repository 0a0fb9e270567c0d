"""What the terminal shows while something runs."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

PLAIN_EVERY = 50  # steps between lines where the output is no terminal


@contextmanager
def training_progress(console: Console, begun: int, steps: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A bar with loss, tokens/s and time left on a terminal; a line now and then elsewhere. Yields what takes the metrics."""
    if not console.is_terminal:

        def line(metrics: Mapping[str, Any]) -> None:
            if metrics["step"] % PLAIN_EVERY == 0 or metrics["step"] == steps:
                text = "step {step}/{steps}  loss {loss:.4f}  grad norm {grad_norm:.3f}  {tokens_per_second:,.0f} tokens/s"
                console.print(text.format(steps=steps, **metrics), soft_wrap=True)

        yield line
        return
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=steps, completed=begun, loss=float("nan"), rate=0.0)

        def update(metrics: Mapping[str, Any]) -> None:
            bar.update(task, completed=metrics["step"], loss=metrics["loss"], rate=metrics["tokens_per_second"])

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

    def __call__(self, step: int, denoised: Tensor) -> None:
        """Show A0_hat [1, M, K] of one pass."""
        row = Text(f"\n{step:3d}  " if step == 1 else f"{step:3d}  ", style="dim")
        for token in denoised[0].tolist():
            for value in token:
                style = "bold green" if value > 0.5 else "bold red" if value < -0.5 else "dim"
                row.append("1" if value > 0.5 else "0" if value < -0.5 else "·", style=style)
            row.append("  ")
        self._console.print(row)
