"""`bitlm prep` as its user meets it: what it prints, refuses, and leaves when it is stopped."""

import base64
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_text
from rich.console import Console

from bitlm_dist.cli import prep
from bitlm_dist.data_prep import output_units, prepare, sources
from bitlm_dist.errors import UserError

pytestmark = pytest.mark.integration

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d "


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "my.txt"
    file.write_text("\n\n".join(make_text(seed, 60) for seed in range(30)))
    return file


def words_for(source, out, *more, tokenizer=None):
    if tokenizer is None:  # the 256 bytes, which need no training
        tokenizer = source.with_name("bytes.tiktoken")
        tokenizer.write_bytes(
            b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
        )
    return ("prep", source, "--tokenizer", tokenizer, "--out", out, "--workers", 1, *more)


def test_its_lines_say_what_happens_and_what_comes_next(bitlm, text, tmp_path):
    out = tmp_path / "my data"
    lines = bitlm(*words_for(text, out, tokenizer="bpe:300")).output.splitlines()
    assert lines[0] == f"preparing {text} into {out}"
    phases = [re.sub(STAMP, "", line) for line in lines if re.match(STAMP, line)]
    assert phases == ["reading", "training bpe:300", "tokenizing", "finishing"]

    size = text.stat().st_size
    counts = rf"1 document, [\d,]+ tokens, {size:,} bytes of text in 1 unit"
    assert re.fullmatch(f"{re.escape(str(out))}: {counts}", lines[-3])
    assert re.fullmatch(r"dropped: none; unigram entropy \d\.\d{3} nats per token", lines[-2])
    assert lines[-1] == f"next: bitlm train quickstart --data.path '{out}' --run.dir 'runs/my data'"
    assert "| inputs | 1 file, names" in (out / "report.md").read_text()

    again = bitlm(*words_for(text, out, tokenizer="bpe:300")).output
    assert "in 1 unit (1 there before)" in again
    assert bitlm(*words_for(text, out, "--quiet", tokenizer="bpe:300")).output == ""
    assert (
        json.loads(bitlm(*words_for(text, out, "--json", tokenizer="bpe:300")).output)["documents"]
        == 1
    )


def test_the_vocabulary_that_came_out_and_a_missing_split_are_said(bitlm, tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    words = ("prep", file, "--tokenizer", "bpe:100000000", "--out", tmp_path / "out")
    output = bitlm(*words, "--workers", 1).output
    size = json.loads((tmp_path / "out/manifest.json").read_text())["vocabulary"]
    small = f"the tokenizer has {size} tokens, not 100,000,000: the text has no more pairs to merge"
    missing = "none of 3 documents fell into the validation split: raise --validation or give more"
    for note in (small, missing):
        assert note in output
        assert note[1:] in (tmp_path / "out/report.md").read_text()
    assert "3 documents, " in output


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        (("--max-chars", 3), "3 longer than --max-chars: raise --max-chars (0: no limit), or"),
        (("--min-chars", 30), "3 shorter than --min-chars: lower --min-chars"),
        (("--field", "body", "--on-error", "skip"), "3 no text in the field: name the key or"),
    ],
)
def test_when_no_document_is_left_the_remedy_is_named(bitlm, tmp_path, option, remedy):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "one a"}\n{"text": "two b"}\n{"text": "three c"}\n')
    with pytest.raises(UserError, match=re.escape(f"no document is left; dropped: {remedy}")):
        bitlm(*words_for(file, tmp_path / "new" / "out", *option))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("megabytes", [2, 6])
def test_a_text_of_ones_own_is_prepared_or_told_how(bitlm, tmp_path, megabytes):
    """With a thousandth of the size: of the text, and of the limit of 5 million characters."""
    file = tmp_path / "mine.txt"
    file.write_text("\n\n".join(make_text(seed, 20) for seed in range(9 * megabytes)))
    assert 800 * megabytes < file.stat().st_size < 1100 * megabytes

    words = words_for(file, tmp_path / "out", "--max-chars", 5000)
    if megabytes == 6:
        with pytest.raises(UserError, match="is one document of more than 5,000 char") as refused:
            bitlm(*words)
        assert r"at its blank lines with --document-separator '\n\n'" in str(refused.value)
        words = (*words, "--document-separator", r"\n\n")

    bitlm(*words)
    splits = json.loads((tmp_path / "out/manifest.json").read_text())["splits"]
    documents = [splits[split]["documents"] for split in ("train", "validation")]
    assert documents == [1, 1] if megabytes == 2 else (sum(documents) == 54 and all(documents))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_says_that_the_same_command_goes_on(
    bitlm, text, tmp_path, monkeypatch, number, code
):
    monkeypatch.setattr(output_units, "MEGABYTE", 500)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000)
    words = words_for(text, tmp_path / "out", "--document-separator", r"\n\n")
    plain = output_units.write_unit
    before = signal.getsignal(signal.SIGTERM)

    def write_unit(unit, *arguments):
        if unit.name.startswith("00003"):
            os.kill(os.getpid(), number)
        return plain(unit, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(output_units, "write_unit", write_unit)
        stopped = bitlm(*words, code=code)
    line = f"bitlm: {tmp_path}/out is not finished: the same command goes on from there\n"
    assert stopped.stderr == line
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "out/.work").exists()
    assert "(3 there before)" in bitlm(*words).output

    # what is complete stays so: nothing is written once a rerun has begun to read
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "find_files", lambda *_: os.kill(os.getpid(), number))
        stopped = bitlm(*words, code=code)
    assert stopped.stderr == f"bitlm: {tmp_path}/out is complete, as it was\n"


def test_a_source_that_vanishes_is_named_and_nothing_is_left(bitlm, text, tmp_path, monkeypatch):
    plain = prepare.find_files

    def find_and_lose(*arguments):
        files = plain(*arguments)
        text.unlink()
        return files

    monkeypatch.setattr(prepare, "find_files", find_and_lose)
    with pytest.raises(UserError, match=r"my.txt cannot be read: No such file or directory"):
        bitlm(*words_for(text, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


WITHOUT_RIGHTS = ("setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override")


def test_a_folder_that_must_not_be_written_is_named_with_the_true_reason(text, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    command = [sys.executable, "-m", "bitlm_dist", *map(str, words_for(text, "locked/out"))]
    if os.geteuid() == 0:  # root may write anywhere, unless it gives that right away
        if subprocess.run([*WITHOUT_RIGHTS, "true"], check=False, capture_output=True).returncode:
            pytest.skip("needs setpriv")
        command = [*WITHOUT_RIGHTS, *command]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (
        2,
        "bitlm: locked/out: permission denied: choose another path, or ask for the permission\n",
    )


def test_a_disk_that_fills_while_the_tokenizer_is_written_is_one_line(
    bitlm, text, tmp_path, monkeypatch
):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(prepare, "train_bpe_in_child", full)
    with pytest.raises(UserError, match="out: the disk is full: make room and run the same comma"):
        bitlm(*words_for(text, tmp_path / "out", tokenizer="bpe:300"))


def test_the_next_command_can_be_copied_from_a_narrow_terminal(monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, highlight=False, width=30)
    monkeypatch.setattr(prep, "console", terminal)
    prep._print_next(Path("data/[red] it's"))
    quoted = """'data/[red] it'"'"'s' --run.dir 'runs/[red] it'"'"'s'"""
    line = f"next: bitlm train quickstart --data.path {quoted}\n"
    assert terminal.file.getvalue() == line


@pytest.mark.parametrize("columns", [80, 100])
def test_the_help_has_its_options_in_groups_and_cuts_no_name(bitlm, columns):
    page = bitlm("prep", "--help", columns=columns).output
    for panel in ("Reading documents", "Leaving documents out", "Running"):
        assert f"─ {panel} ─" in page
    assert "--language-probability " in page
    assert not re.search(r"--[\w-]*…", page)
