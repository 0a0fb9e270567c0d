"""What the commands share: the words they take and the way they print."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitlm_dist import config_loading
from bitlm_dist.errors import UserError
from bitlm_dist.paths import expanded

console = Console(highlight=False)
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="CONFIG [--SECTION.KEY VALUE]…", help="YAML file or shipped name, then overrides."),
]


def expanded_path(name: str) -> Callable[[str], str]:
    """Make a function that replaces ``~`` and variables in a path of the command line, which a shell leaves in ``--out=~/x``.

    Args:
        name: of the option or argument, for messages.
    """

    def expand(text: str) -> str:
        if Path(text).exists():  # a name with a dollar sign or tilde, which the shell has been told to leave alone
            return text
        try:
            return expanded(text)
        except UserError as error:
            raise UserError(f"{name} {text}: {error}") from None

    return expand


def path_argument(metavar: str, words: str) -> Any:
    """An argument that is a path, or several."""
    return typer.Argument(metavar=metavar, help=words, parser=_path)


def path_option(name: str, words: str, metavar: str = "PATH") -> Any:
    """An option that is a path, or several."""
    return typer.Option(name, metavar=metavar, help=words, parser=_path)


def _path(text: str) -> Path:
    try:
        return Path(text) if Path(text).exists() else Path(expanded(text))  # as in expanded_path
    except UserError as error:  # a ValueError, whose words typer would not print
        raise typer.BadParameter(f"{text}: {error}") from None


Run = Annotated[Path, path_argument("RUN", "Run folder.")]
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
    return config_loading.load(Path(expanded_path("CONFIG")(file)), rest)


def check_plot(plot: Path | None) -> None:
    """Refuse a file that cannot be drawn into."""
    if plot and plot.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot {plot}: name a file that ends in .svg, .png or .pdf")
