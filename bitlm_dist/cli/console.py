"""Arguments, options and output that the commands share."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitlm_dist import config_loading
from bitlm_dist.errors import UserError
from bitlm_dist.paths import expand_path

console = Console(highlight=False)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG [--SECTION.KEY VALUE]…",
        help="YAML file or name of a shipped config, then overrides.",
    ),
]


def path_expander(name: str) -> Callable[[str], str]:
    """Make a function that expands ``~`` and variables in a path from the command line.

    A shell does not expand them in ``--out=~/x``.

    Args:
        name: name of the option or argument, for messages.
    """

    def expand(text: str) -> str:
        # An existing name with a dollar sign or tilde was quoted in the shell and is meant as is.
        if Path(text).exists():
            return text
        try:
            return expand_path(text)
        except UserError as error:
            raise UserError(f"{name} {text}: {error}") from None

    return expand


def path_argument(metavar: str, words: str) -> Any:
    """Declare an argument that is a path, or a list of paths."""
    return typer.Argument(metavar=metavar, help=words, parser=_parse_path)


def path_option(name: str, words: str, metavar: str = "PATH") -> Any:
    """Declare an option that is a path, or a list of paths."""
    return typer.Option(name, metavar=metavar, help=words, parser=_parse_path)


def _parse_path(text: str) -> Path:
    try:
        # an existing name is meant as is, as in path_expander
        return Path(text) if Path(text).exists() else Path(expand_path(text))
    except UserError as error:  # typer does not print the message of a ValueError
        raise typer.BadParameter(f"{text}: {error}") from None


Run = Annotated[Path, path_argument("RUN", "Run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def print_line(text: str) -> None:
    """Print one line without markup or wrapping."""
    console.print(text, soft_wrap=True, markup=False)


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; long cells are folded, not cut."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))

    console.print(table)


def load_config_from_words(words: list[str]) -> config_loading.LoadedConfig:
    """Load the config that the words of a command line name.

    Args:
        words: overrides and a config file: the first word that is neither an override nor the
            value of one.

    Raises:
        UserError: there is no config file, or the config is invalid.
    """
    overrides: list[str] = []
    file: str | None = None
    pending = False  # the last word was an override that waits for its value
    for word in words:
        if file is None and not pending and not word.startswith("--"):
            file = word
            continue
        pending = word.startswith("--") and "=" not in word
        overrides.append(word)

    if file is None:
        raise UserError("no config file given: name one after the command, e.g. quickstart")
    return config_loading.load_config(Path(path_expander("CONFIG")(file)), overrides)


def check_plot(plot: Path | None) -> None:
    """Raise a :class:`UserError` unless the plot's file format is supported."""
    if plot and plot.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot {plot}: name a file that ends in .svg, .png or .pdf")
