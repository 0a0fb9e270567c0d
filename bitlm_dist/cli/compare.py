"""The command `bitlm compare`."""

from pathlib import Path
from typing import Annotated

import typer

from bitlm_dist.cli.console import (
    AsJson,
    check_plot,
    path_argument,
    path_option,
    print_line,
    print_table,
)
from bitlm_dist.errors import UserError
from bitlm_dist.strict_json import to_json


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
    as_json: AsJson = False,
) -> None:
    """Compare runs: bits per byte, its ratio to the first run, and the CPU-seconds of rank 0.

    The values are those of the latest evaluation of each run, by training or by `bitlm eval`. A
    ratio is printed only for runs that were scored on the same text.
    """
    from bitlm_dist.evaluation import compare as comparison
    from bitlm_dist.evaluation import compare_plot
    from bitlm_dist.evaluation.run_records import load_records

    if markdown and as_json:
        raise UserError("--markdown and --json exclude each other: leave out one of them")
    check_plot(plot)
    if axis not in (None, *compare_plot.AXES):
        raise UserError(f"--axis {axis}: choose from {', '.join(compare_plot.AXES)}")

    records = load_records(runs)
    plot_axis = compare_plot.choose_axis(records, axis) if plot else ""

    # printed before the plot is saved, which may fail although it was tried
    if as_json:
        print(to_json(comparison.json_report(records)))
    elif markdown:
        print(comparison.markdown_table(records))
    else:
        print_table("", comparison.COLUMNS, comparison.table_rows(records))
        for note in comparison.footnotes(records):
            print_line(note)

    if plot:
        compare_plot.plot(records, plot_axis, plot)
        if not (as_json or markdown):
            print_line(f"plot: {plot}")
