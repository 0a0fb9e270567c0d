"""Draw docs/overview.svg: the path from text to text, with a color for each engine."""

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "overview", "svg.fonttype": "none", "font.family": "sans-serif"}

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402

STREAMING = "#f3d9b1"
MEGATRON = "#bcd9f5"
ZERO = "#c9e8c4"
PLAIN = "#e6e6e6"
LEGEND = [
    (STREAMING, "mosaicml-streaming"),
    (MEGATRON, "Megatron-core: tensor, pipeline, context, data"),
    (ZERO, "DeepSpeed ZeRO or FSDP2"),
    (PLAIN, "this project"),
]


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str) -> None:
    """Draw a rounded box whose lower left corner is (x, y)."""
    shape = FancyBboxPatch(
        (x, y), width, 1.1, boxstyle="round,pad=0.04", facecolor=color, edgecolor="#555555"
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + 0.55, text, ha="center", va="center", fontsize=7.8)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """Draw an arrow with a label above its middle."""
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="#333333")
    )
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    axes.text(middle[0], middle[1] + 0.1, text, ha="center", va="bottom", fontsize=7.5)


def main() -> None:
    """Write the picture beside this file."""
    figure, axes = plt.subplots(figsize=(9.6, 3.5))
    axes.set(xlim=(-0.2, 15.4), ylim=(-0.9, 4.6))
    axes.axis("off")

    # upper row: from text to the context of the next block
    box(axes, 0.0, 2.6, 2.0, "shards of tokens\npacked documents", STREAMING)
    box(axes, 3.1, 2.6, 1.8, "codes\nB bits per token", PLAIN)
    box(axes, 6.0, 2.6, 1.7, "bit MLP\nB → d → d", MEGATRON)
    box(axes, 8.8, 2.6, 2.6, "block-causal\nTransformer", MEGATRON)
    box(axes, 12.8, 2.6, 2.2, "shift by one block\nm states", PLAIN)
    arrow(axes, (2.05, 3.15), (3.05, 3.15), "ids")
    arrow(axes, (4.95, 3.15), (5.95, 3.15), "±1")
    arrow(axes, (7.75, 3.15), (8.75, 3.15))
    arrow(axes, (11.45, 3.15), (12.75, 3.15), "hidden")

    # lower row: the head denoises the next block, whose tokens come back
    box(axes, 12.8, 0.2, 2.2, "noise\nm × B values", PLAIN)
    box(axes, 8.8, 0.2, 2.6, "diffusion head\nm tokens at once", ZERO)
    box(axes, 3.1, 0.2, 1.8, "next block\nm tokens", PLAIN)
    arrow(axes, (12.75, 0.75), (11.45, 0.75))
    arrow(axes, (13.9, 2.55), (11.2, 1.35), "")
    axes.text(13.15, 1.85, "context", ha="left", va="center", fontsize=7.5)
    arrow(axes, (8.75, 0.75), (4.95, 0.75), "m × B bits, a few denoising steps")
    arrow(axes, (4.0, 1.35), (4.0, 2.55))
    axes.text(3.9, 1.95, "generation", ha="right", va="center", fontsize=7.5)

    for i, (color, name) in enumerate(LEGEND):
        x = (0.0, 3.4, 9.2, 13.0)[i]
        axes.add_patch(plt.Rectangle((x, -0.75), 0.35, 0.35, facecolor=color, edgecolor="#555555"))
        axes.text(x + 0.5, -0.58, name, ha="left", va="center", fontsize=7.5)

    figure.savefig(
        Path(__file__).with_name("overview.svg"), bbox_inches="tight", metadata={"Date": None}
    )


if __name__ == "__main__":
    main()
