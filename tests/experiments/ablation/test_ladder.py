"""Every row of the study can be run: its config is valid, and its model takes two steps."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import ladder
import pytest
from typer.testing import CliRunner

from bitlm_dist.cli import app
from bitlm_dist.config_loading import load_config

ROWS = ladder.rows()

# Sizes at which a row trains in a fraction of a second; one thread loads and writes.
TINY = shlex.split("""
--data.sequence_length 32 --model.backbone.num_layers 1 --model.backbone.hidden_size 16
--model.backbone.num_heads 2 --model.backbone.num_kv_heads 2 --model.backbone.head_dim 8
--model.backbone.ffn_hidden_size 32 --head.num_layers 1 --head.hidden_size 16 --head.num_heads 2
--training.steps 2 --training.global_batch_tokens 128 --evaluation.every_steps 0
--checkpoint.asynchronous false
""")


def part_of(row, *keys):
    return json.dumps({key: row.get(key) for key in keys})


# The first row of each kind of model; the others differ from it in sizes.
KINDS = ("preset", "model.output", "model.block_size", "head.ablation", "distillation.teacher")
FIRST = {part_of(row, *KINDS): name for name, row in reversed(ROWS.items())}.values()


def train(name, run, data, *words):
    words = ["train", "study", *ladder.words(ROWS[name]), *TINY, *words]
    result = CliRunner().invoke(app, [*words, "--run.dir", str(run), "--data.path", str(data)])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, prepared):
    run = tmp_path_factory.mktemp("study") / "softmax"
    train("softmax", run, prepared)
    return run


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_valid_with_the_study(name):
    load_config(Path("study"), ladder.words(ROWS[name]))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FIRST else pytest.mark.slow) for n in ROWS]
)
def test_a_row_trains(name, tmp_path, prepared, teacher):
    words = ["--distillation.teacher", str(teacher)] if "distilled" in name else []
    lines = train(name, tmp_path / "run", prepared, *words)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_every_head_has_a_row():
    from bitlm_dist.model.heads.build import ABLATIONS, _load

    named = {row.get("head.ablation") for row in ROWS.values()} - {None}
    assert named == set(_load(ABLATIONS).HEADS)


def test_the_script_prints_what_the_command_line_reads(tmp_path):
    def run(*names):
        command = [sys.executable, ladder.__file__, *names]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert run().stdout.split() == list(ROWS)
    found = load_config(Path("study"), run("m1-lookahead").stdout.split()).config
    assert (found.head.ablation, found.model.block_size, found.model.input_window) == (
        "own_readout",
        1,
        0,
    )

    refused = run("bear")
    assert refused.returncode == 2
    assert not refused.stdout
    assert refused.stderr.count("\n") == 1
    assert all(name in refused.stderr for name in ROWS)
