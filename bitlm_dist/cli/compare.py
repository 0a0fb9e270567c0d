"""The command `bitlm compare`."""

from pathlib import Path
from typing import Annotated

import typer

from bitlm_dist.cli.console import (
    check_plot,
    path_argument,
    path_option,
    print_line,
    print_table,
)
from bitlm_dist.errors import UserError


def compare_command(
    runs: Annotated[
        list[Path], path_argument("RUN…", "Run folders; the first is the base of the ratios.")
    ],
    plot: Annotated[
        Path | None,
        path_option("--plot", "Plot bits per byte over --axis: .svg, .png or .pdf.", "FILE"),
    ] = None,
    axis: Annotated[
        str | None,
        typer.Option(
            help="Axis of the plot: predicted_tokens (default, if all runs counted them), "
            "text_bytes, tokens, cpu_seconds or seconds."
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, with the command of each run.")
    ] = False,
) -> None:
    """Compare runs: bits per byte, its ratio to the first run, and cost.

    The values are those of the evaluations during training.
    """
    from bitlm_dist.evaluation import compare as comparison

    check_plot(plot)
    if axis not in (None, *comparison.AXES):
        raise UserError(f"--axis {axis}: choose from {', '.join(comparison.AXES)}")

    records = [comparison.load_record(run) for run in runs]
    if plot:
        comparison.plot(records, comparison.choose_axis(records, axis), plot)

    if markdown:
        print(comparison.markdown_table(records))
    else:
        print_table("", comparison.COLUMNS, comparison.table_rows(records))
        for note in comparison.footnotes(records):
            print_line(note)
