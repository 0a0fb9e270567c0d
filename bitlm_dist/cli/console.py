"""Arguments, options and output that the commands share."""

import codecs
import os
import sys
import tempfile
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitlm_dist import config_loading
from bitlm_dist.errors import UserError, os_error_message
from bitlm_dist.paths import expand_path


class TerminalConsole(Console):
    """A console whose reader may go away, as `tee` does at Ctrl-C in `bitlm train … | tee log`."""

    def on_broken_pipe(self) -> None:
        """Print nothing more. The work goes on: it may be a run that has to save first."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


console = TerminalConsole(highlight=False)
# for the progress of commands that print a result
stderr_console = TerminalConsole(highlight=False, stderr=True)
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
        try:
            return _expand(text)
        except UserError as error:
            raise UserError(f"{name} {error}") from None

    return expand


def _expand(text: str) -> str:
    if not text:  # Path("") is the current folder
        raise UserError("is empty: name a path")
    # An existing name with a dollar sign or tilde was quoted in the shell and is meant as is.
    if Path(text).exists():
        return text
    try:
        return expand_path(text)
    except UserError as error:
        raise UserError(f"{text}: {error}") from None


def path_argument(metavar: str, words: str) -> Any:
    """Declare an argument that is a path, or a list of paths."""
    return typer.Argument(metavar=metavar, help=words, parser=_parse_path)


def path_option(name: str, words: str, metavar: str = "PATH", help_panel: str | None = None) -> Any:
    """Declare an option that is a path, or a list of paths."""
    return typer.Option(
        name, metavar=metavar, help=words, parser=_parse_path, rich_help_panel=help_panel
    )


def _parse_path(text: str) -> Path:
    try:
        return Path(_expand(text))
    except UserError as error:  # typer does not print the message of a ValueError
        raise typer.BadParameter(str(error)) from None


Run = Annotated[Path, path_argument("RUN", "Run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


ASCII = {"±": "+-", "–": "-", "—": "-", "−": "-", "…": "...", "×": "x", "·": ".", "→": "->"}
ASCII |= {"†": "+", "≤": "<=", "≥": ">=", "█": "#", "┤": "|", "└": "+", "─": "-"}
MAX_WORD = 24  # columns: longer words, mostly paths, may be folded in a table


def prepare_terminal() -> None:
    """Replace characters that the output's encoding lacks; without TERM, assume a dumb terminal.

    Nothing is drawn over and over on a terminal of which nothing is known.
    """
    os.environ.setdefault("TERM", "dumb")
    codecs.register_error("bitlm", _as_ascii)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="bitlm")


def _as_ascii(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks, as a handler of :mod:`codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    plain = "".join(
        ASCII.get(char)
        or unicodedata.normalize("NFKD", char).encode("ascii", "ignore").decode()
        or "?"
        for char in text
    )
    return plain, error.end


def print_line(text: str) -> None:
    """Print text without markup, broken between words on a terminal and not at all elsewhere."""
    if console.is_terminal:
        # a path is kept in one piece, which the terminal itself continues on the next row
        text = "\n".join(
            textwrap.fill(line, console.width, break_long_words=False, break_on_hyphens=False)
            if len(line) > console.width
            else line
            for line in text.split("\n")
        )
    console.print(text, soft_wrap=True, markup=False)


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table; where it is too wide for its words, a line per cell: ``column: value``."""
    columns = list(columns)
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [
        max(_longest_word(text) for text in (name, *(row[i] for row in cells)))
        for i, name in enumerate(columns)
    ]

    # a column takes a blank on both sides and a line
    if sum(widths) + 3 * len(widths) + 1 > console.width:
        _print_as_lines(title, columns, cells)
        return

    table = Table(title=title, title_justify="left")
    for column, width in zip(columns, widths, strict=True):
        table.add_column(column, overflow="fold", min_width=width)
    for row in cells:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


def _longest_word(text: str) -> int:
    return max((min(len(word), MAX_WORD) for word in text.split()), default=0)


def _print_as_lines(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a line per row of two columns, a name and its value; of more, a paragraph per row."""
    if title:
        print_line(title)
    for row in rows:
        if len(columns) == 2:
            print_line(f"{row[0]}: {row[1]}")
            continue
        for column, cell in zip(columns, row, strict=True):
            if cell:
                print_line(f"{column}: {cell}" if column else cell)
        print_line("")


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


def check_output_file(option: str, file: Path | None) -> None:
    """Check before the work that its result can be written.

    Args:
        option: the option that names the file, for the message.
        file: the file, which may exist; None: there is none to write.

    Raises:
        UserError: the file is a folder, or cannot be created or replaced.
    """
    if file is None:
        return
    try:
        if file.is_dir():
            raise UserError(f"{option} {file} is a folder: name a file in it")
        # A file is made and removed: permissions alone do not tell of full or read-only disks.
        handle, name = tempfile.mkstemp(prefix=f".{file.name[:100]}.", dir=file.parent)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        error.filename = str(file.parent if isinstance(error, FileNotFoundError) else file)
        raise UserError(f"{option} {os_error_message(error)}") from None


def check_plot(plot: Path | None) -> None:
    """Raise a :class:`UserError` unless the plot's file format is supported and can be written."""
    if plot and plot.suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot {plot}: name a file that ends in .svg, .png or .pdf")
    check_output_file("--plot", plot)
