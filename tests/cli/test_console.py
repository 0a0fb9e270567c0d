import io
import os
import stat

import pytest
from rich.console import Console

from bitlm_dist.cli import console as console_module
from bitlm_dist.cli.console import (
    TerminalConsole,
    check_output_file,
    prepare_terminal,
    print_line,
    print_table,
)
from bitlm_dist.errors import UserError

COLUMNS = ("run", "bits per byte", "command")
ROWS = [("one", "1.5470 ± 0.0090", "bitlm train quickstart"), ("two", "–", "")]


@pytest.fixture
def screen(monkeypatch):
    """Makes the commands' console one of a given width; returns what was printed on it."""

    def make(width, terminal=True):
        stream = io.StringIO()
        new = Console(file=stream, force_terminal=terminal, width=width, highlight=False)
        monkeypatch.setattr(console_module, "console", new)
        return stream

    return make


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 100])
def test_every_word_of_a_table_is_on_the_screen(screen, width):
    stream = screen(width)
    print_table("runs", COLUMNS, ROWS)
    for row in (COLUMNS, *ROWS):
        for word in " ".join(row).split():
            assert word in stream.getvalue(), width


def test_a_narrow_table_is_a_line_per_cell(screen):
    stream = screen(15)
    print_table("", ("", "value"), [("state", "running")])
    assert stream.getvalue() == "state: running\n"

    stream = screen(20)
    print_table("", COLUMNS, ROWS[:1])
    assert stream.getvalue().splitlines()[0] == "run: one"


def test_lines_break_between_words_on_a_terminal_alone(screen):
    text = "98 % of the documents of " + "/long" * 20 + " are cut"
    stream = screen(30)
    print_line(text)
    lines = stream.getvalue().splitlines()
    assert " ".join(lines) == text
    assert "/long" * 20 in lines, "a path stays in one piece, to be copied"

    stream = screen(30, terminal=False)
    print_line(text)
    assert stream.getvalue() == f"{text}\n"


def test_a_reader_that_goes_away_ends_nothing():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        console = TerminalConsole(file=stream)
        for _ in range(3):
            console.print("a line")
        print("a line", file=stream, flush=True)  # what does not go through the console, too


def test_an_output_is_tried_before_the_work(tmp_path):
    (tmp_path / "file").write_text("kept")
    check_output_file("--out", None)
    check_output_file("--out", tmp_path / "new.json")
    check_output_file("--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"

    for path, reason in (
        (tmp_path, "is a folder: name a file in it"),
        (tmp_path / "none" / "x", "none: no such file or directory"),
        (tmp_path / "file" / "x", "not a directory"),
        (tmp_path / ("x" * 300), "file name too long"),
    ):
        with pytest.raises(UserError, match=f"--out .*{reason}"):
            check_output_file("--out", path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_an_encoding_lacks_is_replaced(monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    prepare_terminal()
    stream.write("1.5 ± 0.1 × 2 … ü 漢 ▁█")
    stream.flush()
    assert raw.getvalue() == b"1.5 +- 0.1 x 2 ... u ? ?#"


def test_an_unknown_terminal_is_a_dumb_one(monkeypatch):
    monkeypatch.delenv("TERM", raising=False)
    prepare_terminal()
    assert os.environ["TERM"] == "dumb"
    assert not Console(force_terminal=True).is_interactive
    monkeypatch.setenv("TERM", "xterm")
    prepare_terminal()
    assert os.environ["TERM"] == "xterm"


def test_a_folder_without_permission_is_named_as_such(tmp_path, without_root_powers):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with without_root_powers(), pytest.raises(UserError, match="--plot .*ermission denied"):
        check_output_file("--plot", tmp_path / "x.svg")
