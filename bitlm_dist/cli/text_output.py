"""Generated text as it grows, and the bits of its blocks as they settle."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor


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
