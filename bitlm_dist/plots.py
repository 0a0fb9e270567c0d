"""Plots in files."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from bitlm_dist.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_plot(figure: "Figure", file: Path) -> None:
    """Write a plot completely or not at all, in the format of the file's ending."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=file.suffix[1:])
    write_atomically(file, drawn.getvalue())
