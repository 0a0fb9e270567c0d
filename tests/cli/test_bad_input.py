"""What users misspell and point at the wrong thing: words, exit code, and what is left behind.

bad_input.txt has the rows: a command, and below it the error, in which … stands for any text. Each
exits with 2, prints one line on standard error and leaves nothing behind. Standard output may have
the line by which a command says that it begins. Commands run in this process, through the entry
point.
"""

import os
import re
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import make_text

from bitlm_dist.__main__ import main

TABLE = Path(__file__).with_name("bad_input.txt")
LONG = "x" * 300
BEGINNING = (
    r"bitlm train: .*: loading torch…|preparing .*|evaluating .*"
    r"|\d{4}-\d\d-\S+ .*|the tokenizer .*"
)


class Row(NamedTuple):
    command: str
    words: str


class Result(NamedTuple):
    code: int
    out: str
    err: str


def rows():
    """The rows of the table."""
    pairs = re.findall(r"^\$ (.*)\n  (.*)$", TABLE.read_text(), re.MULTILINE)
    return [Row(*pair) for pair in pairs]


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus, prepared, tiny_file):
    """A folder with inputs of every kind; DATA is a prepared folder, RUN a trained run."""
    root = tmp_path_factory.mktemp("place")
    make_sources(root, corpus)
    make_files(root, tiny_file)
    make_data(root, prepared)
    make_runs(root)
    return root


def make_sources(root, corpus):
    (root / "folder").mkdir()
    (root / "closed").mkdir(mode=0o500)
    (root / "foreign").mkdir()
    (root / "foreign" / "thesis.tex").write_text("mine")
    (root / "a.txt").write_text(make_text(0, 3000))
    (root / "empty.txt").touch()
    (root / "binary.txt").write_bytes(bytes(range(256)) * 4)
    (root / "README.md").write_text("# no source\n")
    (root / "no-field.jsonl").write_text('{"txt": "a"}\n')
    (root / "second.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (root / "cut.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04\x00")
    shutil.copy(corpus, root / "corpus.jsonl")


def make_files(root, tiny_file):
    shutil.copy(tiny_file, root / "tiny.yaml")
    (root / "empty.yaml").touch()
    (root / "broken.yaml").write_text("training: {steps: 3\n")
    (root / "list.yaml").write_text("- 1\n- 2\n")
    (root / "typo.yaml").write_text("training:\n  step: 3\n")
    (root / "results.json").write_text("{}")
    (root / "not-json.json").write_text("{")


def make_data(root, prepared):
    shutil.copytree(prepared, root / "DATA")
    shutil.copytree(prepared, root / "no-manifest")
    (root / "no-manifest" / "manifest.json").unlink()
    shutil.copytree(prepared, root / "cut-shard")
    shard = next((root / "cut-shard" / "train").rglob("*.mds.zstd"))
    shard.write_bytes(shard.read_bytes()[:-3])


def make_runs(root):
    words = f"train {root}/tiny.yaml --run.dir {root}/RUN --data.path {root}/DATA"
    words += " --training.steps 2 --evaluation.every_steps 1 --evaluation.num_sequences 4"
    assert command(words, root) == 0

    def copy(name):
        return Path(shutil.copytree(root / "RUN", root / name))

    shutil.rmtree(copy("no-checkpoint") / "checkpoints")
    (copy("no-codes") / "codes.npz").unlink()
    (copy("empty-codes") / "codes.npz").write_bytes(b"")
    shutil.rmtree(copy("no-tokenizer") / "tokenizer")
    (copy("broken-config") / "config.yaml").write_text("training: {")
    (copy("no-evaluations") / "evaluations.jsonl").unlink()
    (copy("wrong-evaluations") / "evaluations.jsonl").write_text("[]\n3\n")
    weights = next((copy("damaged") / "checkpoints").glob("step-00000002/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")


def command(words, folder):
    """Run a command in this process, as in a shell in ``folder``; return its exit code."""
    words_before, folder_before = sys.argv, Path.cwd()
    sys.argv = ["bitlm", *shlex.split(words)]
    os.chdir(folder)
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = words_before
        os.chdir(folder_before)
    return 0


def listing(folder):
    """Every file below a folder, with its size."""
    return {
        str(path.relative_to(folder)): path.stat().st_size if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def files_at_first(place):
    return listing(place)


@pytest.fixture
def run(place, files_at_first, capfd, monkeypatch):
    """Runs a command, which must leave nothing behind, and returns what it printed."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run_in_place(words):
        capfd.readouterr()
        code = command(words.replace("PLACE", str(place)).replace("LONG", LONG), place)
        out, err = capfd.readouterr()
        assert listing(place) == files_at_first
        return Result(code, out.replace(str(place), "PLACE"), err.replace(str(place), "PLACE"))

    return run_in_place


def check(result, words):
    """Check that a result is the line of an error the user can mend."""
    shown = f"exit {result.code}\n{result.err}\n{result.out}"
    pattern = ".*".join(re.escape(part) for part in words.split("…"))
    *before, line = result.err.splitlines() or [""]
    assert result.code == 2, shown
    assert re.fullmatch(f"bitlm: {pattern}", line), shown

    for other in (*before, *result.out.splitlines()):
        assert re.fullmatch(BEGINNING, other), shown


def test_the_table_is_long_and_has_no_row_twice():
    commands = [row.command for row in rows()]
    assert len(commands) == len(set(commands)) == TABLE.read_text().count("\n$ ")
    assert len(commands) >= 230


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.command)
def test_bad_input_is_one_line_and_leaves_nothing(row, run):
    check(run(row.command), row.words)


@pytest.mark.parametrize("group", ["", "bench", "data", "checkpoint", "launch"])
def test_a_group_alone_prints_its_help(group, run):
    result = run(group)
    assert (result.code, result.err) == (2, "")
    assert "Commands" in result.out


FORBIDDEN = [
    ("prep corpus.jsonl --tokenizer bpe:300 --out closed/new", "closed/new: permission denied: …"),
    ("train tiny.yaml --data.path DATA --run.dir closed/new", "run.dir …: permission denied: …"),
    ("compare RUN --plot closed/x.svg", "--plot closed/x.svg: permission denied: …"),
    ("bench attention --out closed/x.json", "--out closed/x.json: permission denied: …"),
    ("checkpoint export RUN closed/new", "closed/new: permission denied: …"),
    (
        "launch local tiny.yaml --data.path DATA --run.dir closed/new",
        "run.dir …: permission denied: …",
    ),
]


@pytest.mark.parametrize(("words", "message"), FORBIDDEN)
def test_a_folder_without_permission_is_named(words, message, run, without_root_powers):
    with without_root_powers():
        result = run(words)
    check(result, message)
    assert "room" not in result.err, "there may be plenty"


def test_a_full_disk_is_named(run, place, small_disk):
    """Every output that is tried before the work."""
    with (small_disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
        while filler.write(b"x" * 2**16):
            pass

    for words in (
        f"prep corpus.jsonl --tokenizer bpe:300 --out {small_disk}/new",
        f"train tiny.yaml --data.path DATA --run.dir {small_disk}/new",
        f"checkpoint export RUN {small_disk}/new",
        f"launch local tiny.yaml --data.path DATA --run.dir {small_disk}/new",
    ):
        result = run(words)
        check(result, "…")
        assert "make room" in result.err, result.err
        assert [path.name for path in small_disk.iterdir()] == ["filler"], words
