"""Generated text as it grows, and the bits of its blocks as they settle."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from torch import Tensor

_LABEL_WIDTH = 5  # of the number of a head pass and the blanks after it
_GAP = 2  # blanks between tokens


class TextStream:
    """Prints text as it grows; a character with incomplete bytes waits for the next block."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: str) -> None:
        self._decode = decode
        self._num_shown = 0
        sys.stdout.write(prompt)

    def show(self, ids: Sequence[int]) -> None:
        """Print the text that is new in ``ids``, which are all new tokens so far."""
        # incomplete bytes at the end decode to replacement characters
        text = self._decode(ids).rstrip("\ufffd")
        sys.stdout.write(text[self._num_shown :])
        sys.stdout.flush()
        self._num_shown = max(self._num_shown, len(text))


class BitWatcher:
    """Prints a row of bits per head pass, in groups by token, and a block's text below its rows.

    Args:
        console: where to print; rows that are wider than it are broken between tokens.
        num_bits: bits per token.
        is_sequential: the sampler writes one token per pass, all its bits at once.
        num_known: how many tokens of the first block the prompt fixes.
    """

    def __init__(
        self, console: Console, num_bits: int, *, is_sequential: bool, num_known: int
    ) -> None:
        self._console = console
        self._num_bits = num_bits
        self._is_sequential = is_sequential
        self._num_known = num_known
        self._last_tokens: list[list[float]] = []
        self._tokens_per_line = max(1, (console.width - _LABEL_WIDTH) // (num_bits + _GAP))

    def print_legend(self) -> None:
        """Explain the rows."""
        row = "which writes one token" if self._is_sequential else "in which bits settle"
        legend = Text(f"a row per head pass, {row} (", style="dim")
        legend.append("1", style="bold green").append(" ").append("0", style="bold red")
        legend.append(f", · {'not yet' if self._is_sequential else 'open'})", style="dim")
        if self._num_known:
            legend.append("; ", style="dim").append("prompt underlined", style="dim underline")
        self._console.print(legend)

    def show_pass(self, step: int, denoised: "Tensor") -> None:
        """Print the estimate A0_hat [1, M, K] of one head pass."""
        self._last_tokens = denoised[0].tolist()
        if step == 1:
            self._console.print()
        self._print_lines(f"{step:3d}", [self._format_bits(i) for i in range(len(denoised[0]))])

    def show_block(self, texts: Sequence[str]) -> None:
        """Print the text of each token of the block under its bits.

        Args:
            texts: of all tokens of the block, those of the prompt among them; fewer if it ended.
        """
        cells = [Text(_fit(text, self._num_bits)) for text in texts]
        self._underline_known(cells)
        if len(cells) < len(self._last_tokens):
            cells.append(Text(_fit("(end)", self._num_bits), style="dim"))

        self._print_lines("", cells)
        self._num_known = 0  # only the first block has any

    def _format_bits(self, index: int) -> Text:
        """The bits of a token: bright if certain, dim if open."""
        cell = Text()
        for value in self._last_tokens[index]:
            style = "bold green" if value > 0.5 else "bold red" if value < -0.5 else "dim"
            cell.append("1" if value > 0.5 else "0" if value < -0.5 else "·", style=style)
        if index < self._num_known:
            cell.stylize("underline")
        return cell

    def _underline_known(self, cells: Sequence[Text]) -> None:
        for cell in cells[: self._num_known]:
            cell.stylize("underline")

    def _print_lines(self, label: str, cells: Sequence[Text]) -> None:
        """Print cells of equal width side by side, in as many lines as they need."""
        gap = Text(" " * _GAP)
        for first in range(0, len(cells), self._tokens_per_line):
            line = Text(f"{label if first == 0 else '':3}  ", style="dim")
            shown = cells[first : first + self._tokens_per_line]
            self._console.print(line.append_text(gap.join(shown)), soft_wrap=True)


def _fit(text: str, width: int) -> str:
    """Pad or cut a token's text to the width of its bits, and show what would be invisible."""
    visible = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    visible = visible if visible.strip() else f"'{visible}'"
    if cell_len(visible) > width:
        visible = set_cell_size(visible, width - 1) + "…"
    return set_cell_size(visible, width)
