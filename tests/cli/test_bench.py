import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from typer.testing import CliRunner

from bitlm_dist.cli import app
from bitlm_dist.errors import UserError

SMALL = ("attention", "--length", 16, "--heads", 1, "--batch", 1, "--width", 8, "--repeats", 1)
TRAIN = ("train", "quickstart", "--vocabulary", 300)


def run(*words, **options):
    words = ["bench", *(str(word) for word in words)]
    return CliRunner(env={"COLUMNS": "240"}).invoke(app, words, **options)


OUTPUTS = [
    ("--out", "", "is a folder: name a file in it"),
    ("--out", "none/r.json", "none: no such file or directory"),
    ("--out", "file/r.json", "not a directory: a part of the path is a file"),
    ("--plot", "none/r.svg", "none: no such file or directory"),
    ("--plot", "plot.svg", "plot.svg is a folder: name a file in it"),
]


@pytest.mark.parametrize(("option", "name", "message"), OUTPUTS)
@pytest.mark.parametrize("words", [TRAIN, ("generate", *TRAIN[1:]), SMALL], ids=lambda w: w[0])
def test_outputs_are_tried_before_anything_is_measured(
    words, option, name, message, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    (tmp_path / "plot.svg").mkdir()
    monkeypatch.setattr(time, "perf_counter", None)  # nothing can be measured

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        run(*words, option, tmp_path / name, catch_exceptions=False)
    assert str(caught.value).startswith(f"{option} {tmp_path}")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_results_are_printed_although_they_cannot_be_saved(form, tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    result = run(*SMALL, *form, "--out", tmp_path / "r.json")
    assert isinstance(result.exception, OSError)
    assert result.exception.filename == str(tmp_path / "r.json")
    if form:
        assert json.loads(result.stdout)["results"]
    else:
        assert "speed / SDPA, dense mask" in result.stdout
    assert list(tmp_path.iterdir()) == []


def damage(**changes):
    rate = {"median": 1.0, "lowest": 1.0, "highest": 1.0}
    side = {
        "tokens_per_second": rate,
        "seconds_before": 0.0,
        "cpu_seconds_per_token": 0.0,
        "flops_per_token": {"backbone": 1, "head": 1, "output": 1},
        "flops_per_second": 1.0,
        "mfu": None,
        "peak_bytes": 1,
    }
    record = {
        "version": 2,
        "kind": "train",
        "first": "bits",
        "sides": {"bits": side},
        "settings": {"vocabulary": 300, "width": 8, "layers": 1},
        "environment": {"device": "cpu", "threads": 1},
    }
    return json.dumps(record | changes)


def test_saved_results_are_shown_with_nouns_that_agree(tmp_path):
    (tmp_path / "r.json").write_text(damage())
    output = run("show", tmp_path / "r.json").stdout
    assert "vocabulary 300, width 8, layers 1; cpu, 1 thread\n" in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damage(sides={}), "is damaged: run the bench again"),
        (damage(sides=[]), "is damaged"),
        (damage(first="softmax"), "is damaged"),
        (damage(settings=None), "is damaged"),
        (damage(environment={}), "is damaged"),
        (damage(version=1), "holds results of version 1, this program reads 2: run the bench"),
        ("[]", "holds no bench results: name a file that"),
        ('{"environment": {}, "results": []}', "it is of `bitlm bench attention` or `in-block`"),
        (None, "cannot be read: .*r.json: is a directory: name a file, not a folder"),
    ],
)
def test_files_that_cannot_be_shown_are_named(content, message, tmp_path):
    file = tmp_path / "r.json"
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        run("show", file, catch_exceptions=False)
    assert "\n" not in str(caught.value)


def test_documents_divide_a_sequence():
    with pytest.raises(UserError, match="--length 64 is no multiple of --documents 7"):
        run("attention", "--length", "64", "--documents", "7", catch_exceptions=False)


def is_setting_up(process, scratch):
    # torch starts helpers, too, which may be gone
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children()
        return any("spawn_main" in " ".join(child.cmdline()) for child in children)
    return False


def is_measuring(process, scratch):
    return any(file.stat().st_size for file in scratch.glob("bitlm-bench-*/bits/metrics.jsonl"))


def has_ended(group):
    """Whether all processes of a group end; multiprocessing's own helper ends after its parent."""
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("moment", [is_setting_up, is_measuring])
def test_ctrl_c_is_one_line_and_leaves_nothing(moment, tiny_file, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    words = ("bench", "train", tiny_file, "--vocabulary", "300", "--repeats", "1000")
    process = subprocess.Popen(
        [sys.executable, "-m", "bitlm_dist", *(str(word) for word in words)],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not moment(process, scratch):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)

    # As a terminal does: to every process. The parent is told last, so that no child can be ended
    # by it before its own signal arrives.
    for child in psutil.Process(process.pid).children():
        child.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output, errors) == (130, "", "\nbitlm: interrupted\n")
    assert has_ended(process.pid)

    # torch keeps its cache
    assert [file for file in scratch.iterdir() if "torchinductor" not in file.name] == []
