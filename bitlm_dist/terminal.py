"""What the commands share: the words they take and the way they print."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitlm_dist import config_loading
from bitlm_dist.errors import UserError

console = Console(highlight=False)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONFIG [--SECTION.KEY VALUE]…", help="YAML file or shipped name, then overrides."),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def say(text: str) -> None:
    """Print one line as it is: no markup, no wrapping."""
    console.print(text, soft_wrap=True, markup=False)


def show_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)


def config_of(words: list[str]) -> config_loading.Loaded:
    """The first word that is neither an override nor its value is the config file."""
    rest, file = [], None
    pending = False
    for word in words:
        if file is None and not pending and not word.startswith("--"):
            file = word
            continue
        pending = word.startswith("--") and "=" not in word
        rest.append(word)
    if file is None:
        raise UserError("no config file given: name one after the command, e.g. quickstart")
    return config_loading.load(Path(file), rest)


def check_plot(plot: Path | None) -> None:
    """Refuse a file that cannot be drawn into."""
    if plot and plot.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot {plot}: name a file that ends in .svg, .png or .pdf")
