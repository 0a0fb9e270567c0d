"""What is checked before a run begins, and whom a run folder belongs to."""

import re
import subprocess
import sys

import pytest

from bitlm_dist.errors import UserError
from bitlm_dist.training.run_claim import check_claim, check_start, has_started

# Each is refused by a look at files, without torch: the overrides, and what is said.
REFUSALS = [
    ("--data.path nosuch", r"data.path = nosuch \(from .*\) does not exist: prepare it with"),
    ("--data.path {data}/train", "holds no shards: run `bitlm prep"),
    ("--run.dir {file}", "run.dir = .*file is a file: choose a folder"),
    ("--run.dir {file}/x", "cannot be used: .*x: not a directory: a part of the path is a file"),
    (
        "--run.dir " + "x" * 300,
        "cannot be used: .*x/config.yaml: file name too long: choose a shorter name",
    ),
    ("--run.dir /proc/x", "cannot be used: /proc/x: "),
    ("--run.dir {foreign}", "holds files but no run: choose an empty or a new folder"),
    (
        "--distillation.teacher nosuch",
        r"nosuch \(from .*\) is no run folder: ",
    ),
]
SCRIPT = """
import sys
from pathlib import Path
from bitlm_dist.config_loading import load_config
from bitlm_dist.errors import UserError
from bitlm_dist.training.run_claim import check_start

for line in sys.stdin.read().splitlines():
    try:
        check_start(load_config(Path(sys.argv[1]), line.split()).config, rank=0)
        print("accepted")
    except UserError as error:
        print(error)
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""


def test_a_look_at_files_refuses_without_torch_and_leaves_nothing(tiny_file, prepared, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    names = {name: tmp_path / name for name in ("file", "foreign")}
    base = f"--data.path {prepared} --run.dir new/folder "
    teacher = "--distillation.weight 0.5 "
    lines = [
        base + (teacher if "teacher" in words else "") + words.format(data=prepared, **names)
        for words, _ in REFUSALS
    ]
    before = sorted(tmp_path.rglob("*"))

    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_file)],
        input="\n".join([*lines, base]),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout.splitlines()

    assert found.pop() == "accepted"
    assert len(found) == len(REFUSALS)
    for line, (_, pattern) in zip(found, REFUSALS, strict=True):
        assert re.search(pattern, line), line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_found_before_torch_is_loaded(tiny, small_disk):
    (small_disk / "filler").write_bytes(bytes(4 * 2**20))
    config = tiny("--run.dir", str(small_disk / "run"))
    with pytest.raises(UserError, match="no space left on device: make room on that disk"):
        check_start(config, rank=0)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]

    check_start(config, rank=1)  # only the first rank writes there


def test_only_a_run_that_took_a_step_keeps_its_config(tiny, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("training: {steps: 6}\n")
    (run / "metrics.jsonl").touch()
    assert not has_started(run)
    check_claim(run, tiny("--training.steps", "7"))

    (run / "metrics.jsonl").write_text('{"step": 1')  # cut, but begun
    assert has_started(run)
    with pytest.raises(UserError, match="holds a run with data.sequence_length = 256, now 32"):
        check_claim(run, tiny("--training.steps", "7"))

    (run / "metrics.jsonl").unlink()
    assert not has_started(run)
    (run / "model.safetensors").touch()
    assert has_started(run), "an exported model, or whatever it is"

    (run / "model.safetensors").unlink()
    checkpoint = run / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    assert has_started(run)
