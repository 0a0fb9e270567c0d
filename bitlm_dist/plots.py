"""Plots in files, drawn with matplotlib, which is imported when it is needed."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from bitlm_dist.errors import UserError
from bitlm_dist.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """Make an empty figure.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        UserError: matplotlib cannot be imported.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError(
            f"--plot needs {error.name}, which is missing: pip install matplotlib"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def save_plot(figure: "Figure", file: Path) -> None:
    """Write a plot completely or not at all, in the format of the file's ending."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=file.suffix[1:])
    write_atomically(file, drawn.getvalue())
