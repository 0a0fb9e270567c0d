import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint.tensors import local_entries
from bitlm_dist.cli import app
from bitlm_dist.errors import UserError
from bitlm_dist.parallel.sharded_tensor import ShardedTensor


def run(*words, code=0, columns=240):
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["checkpoint", *map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def save(folder, step, **config):
    entries = local_entries({"model.a": ShardedTensor.from_full(torch.full((2, 3), float(step)))})
    state = {"tokens": 10 * step, "config": {"training": config}}
    return store.save(folder / "checkpoints", step, list(entries), entries.values(), state)


@pytest.fixture
def trained(tmp_path):
    for step in (1, 2):
        save(tmp_path / "run", step, compile=None, deterministic=step == 1)
    return tmp_path / "run"


def test_verify_names_what_is_damaged_in_words_and_in_json(trained):
    folders = [trained / "checkpoints" / f"step-0000000{step}" for step in (1, 2)]
    found = json.loads(run("verify", trained, "--json"))
    assert found == {
        "run": str(trained),
        "checkpoints": [{"folder": str(f), "whole": True, "problem": None} for f in folders],
    }

    weights = folders[1] / "rank-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    found = json.loads(run("verify", trained, "--json", code=1))
    problem = f"checkpoint file {weights} is damaged"
    assert [record["problem"] for record in found["checkpoints"]] == [None, problem]
    assert [record["whole"] for record in found["checkpoints"]] == [True, False]

    # the path is in one piece, however narrow the terminal is
    output = run("verify", trained, code=1, columns=80)
    assert output.splitlines()[-1] == problem
    assert "step-00000001" in output
    assert json.loads(run("verify", folders[0], "--json"))["run"] == str(folders[0])


def test_a_run_without_checkpoints_is_not_called_whole(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for words in (("verify", tmp_path), ("diff", tmp_path, tmp_path)):
        with pytest.raises(UserError, match=f"{tmp_path} holds no checkpoint yet"):
            run(*words)


def test_files_that_cannot_be_read_are_not_called_damaged(trained):
    folder = trained / "checkpoints" / "step-00000002"
    (folder / "state.json").unlink()
    assert f"{folder} is damaged: {folder}/state.json is missing" in run("list", trained)

    (folder / "state.json").mkdir()
    assert f"checkpoint file {folder}/state.json: is a directory" in run("list", trained)


def test_values_that_differ_are_those_of_yaml(trained):
    steps = trained / "checkpoints"
    output = run("diff", steps / "step-00000001", steps / "step-00000002", code=1)
    line = next(line for line in output.splitlines() if "training.deterministic" in line)
    assert [cell.strip() for cell in line.split("│")[2:4]] == ["true", "false"]


def test_looking_at_files_takes_no_torch(trained, prepared):
    code = """
import sys
from bitlm_dist.cli import app
run, data = sys.argv[1:]
for words in (["checkpoint", "list", run], ["checkpoint", "verify", run], ["data", "verify", data]):
    app(words, standalone_mode=False)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, trained, prepared], check=True, capture_output=True)
