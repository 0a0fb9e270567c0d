"""Runs of earlier versions, whose config keys and weights had other names, resume in this version.

tests/fixtures/runs-0.1.tar.xz was written by the last commit of 0.1: runs of 8 steps with
checkpoints, cut back to step 4; an export of one of them; and expected.json with the losses of
steps 5 to 8, the evaluation at step 4, and the machine type. runs-0.2.tar.xz is from a commit after
0.2 and has two smaller runs on the same data: one with model.backbone.rope_reset, one of the preset
`bare`.
"""

import json
import math
import shutil
import tarfile
from pathlib import Path

import golden
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from typer.testing import CliRunner

from bitlm_dist.checkpoint.tensors import read_index
from bitlm_dist.cli import app
from bitlm_dist.config_loading import load_config
from bitlm_dist.errors import UserError
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.integration
FIXTURES = Path(__file__).parents[1] / "fixtures"
ALONE = ("default", "paper", "softmax", "bare", "rope-reset")
TWO_RANKS = ("adamw-zero2-dp2", "muon-fsdp2-dp2")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The folder with the old runs; tests that train use copies."""
    folder = tmp_path_factory.mktemp("old")
    for fixture in sorted(FIXTURES.glob("runs-*.tar.xz")):
        with tarfile.open(fixture) as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def expected(old):
    """What each run did when it was made, and whether this machine must repeat it bit by bit."""
    runs = {}
    for file in old.glob("expected*.json"):
        found = json.loads(file.read_text())
        same_machine = found["machine"] == golden.machine_type()
        runs |= {name: run | {"exact": same_machine} for name, run in found["runs"].items()}
    # without its key this run is the same up to rounding
    runs["rope-reset"]["exact"] = False
    return runs


def same(expected, found):
    """Compare two nested values: keys and lengths exactly, floats to 1e-5."""
    if isinstance(expected, dict):
        return expected.keys() == found.keys() and all(
            same(expected[k], found[k]) for k in expected
        )
    if isinstance(expected, list):
        return len(expected) == len(found) and all(map(same, expected, found))
    if isinstance(expected, float):
        return math.isclose(expected, found, rel_tol=1e-5)
    return expected == found


def bitlm(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


def copied(old, name, folder):
    """Copy an old run, with its data beside it, so that it can be trained."""
    shutil.copytree(old / name, folder / name, symlinks=True)
    if not (folder / "data").is_symlink():
        (folder / "data").symlink_to(old / "data")
    return folder / name


def check_steps(run, expected):
    """Compare steps 5 to 8 of a resumed run: bit by bit on the fixture's machine type."""
    want = expected[run.name]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[4:]]
    for key, values in (("loss", want["losses"]), ("grad_norm", want["grad_norms"])):
        found = [line[key] for line in lines]
        assert found == values if want["exact"] else same(values, found)


def evaluation_of(want, run, *words):
    """What `bitlm eval` says of a run today, in the fields that it had then: later ones are new."""
    found = json.loads(bitlm("eval", run, "--json", *words))
    return {name: found[name] for name in want}


@pytest.mark.parametrize("name", [*ALONE, *TWO_RANKS])
def test_an_old_run_is_evaluated(name, old, expected):
    want = expected[name]["evaluation"]
    found = evaluation_of(want, old / name)
    assert found == want if expected[name]["exact"] else same(want, found)


@pytest.mark.parametrize("name", ALONE)
def test_an_old_run_goes_on(name, old, expected, tmp_path):
    run = copied(old, name, tmp_path)
    words = ["--evaluation.num_noise_levels", "3"]  # a new name over an old file
    trainer = Trainer.build(load_config(run / "config.yaml", words).config).open()
    assert trainer.step == 4

    trainer.fit()
    trainer.close()
    check_steps(run, expected)


@pytest.mark.distributed
@pytest.mark.parametrize("name", TWO_RANKS)
def test_an_old_run_of_two_ranks_goes_on(name, old, expected, tmp_path):
    run = copied(old, name, tmp_path)
    folder = tmp_path / "job"
    folder.mkdir()
    run_ranks(2, "parity", "fit_in_turn", str(run / "config.yaml"), [([], 8)], folder=folder)
    check_steps(run, expected)


def test_an_old_export_is_imported_and_an_old_run_exported(old, expected, tmp_path):
    bitlm("checkpoint", "import", old / "default-export", tmp_path / "imported")
    # an export names its data by a path of the machine that made it
    want = expected["default"]["evaluation"]
    assert same(want, evaluation_of(want, tmp_path / "imported", "--data.path", old / "data"))

    bitlm("checkpoint", "export", old / "default", tmp_path / "exported")
    before = load_file(old / "default-export" / "model.safetensors")
    after = load_file(tmp_path / "exported" / "model.safetensors")
    assert sorted(read_index(tmp_path / "imported" / "checkpoints" / "latest")) == sorted(
        f"model.{name}" for name in after
    )
    # the lookahead of each position was a tensor of its own
    assert len(before) - 4 == len(after) - 1
    for name in before.keys() & after.keys():
        assert before[name].equal(after[name])
    assert after["head.null_embedding"].equal(before["head.null"])
    ahead = torch.stack([before[f"head.ahead.{position}.weight"] for position in range(4)])
    assert after["head.lookahead.weight"].equal(ahead)


def test_old_and_new_names_do_not_mix(old, tmp_path):
    with pytest.raises(UserError, match=r"renamed to evaluation\.num_noise_levels"):
        load_config(old / "default" / "config.yaml", ["--evaluation.strata", "3"])
    shutil.copy(old / "default" / "config.yaml", tmp_path / "mine.yaml")
    with pytest.raises(UserError, match=r"mine\.yaml:\d+\).* renamed to "):
        load_config(tmp_path / "mine.yaml")


def test_a_removed_key_is_dropped_from_an_old_run_and_refused_from_a_user(old, tmp_path):
    file = old / "rope-reset" / "config.yaml"
    assert "rope_reset: true" in file.read_text()
    assert load_config(file).config.training.steps == 8

    shutil.copy(file, tmp_path / "mine.yaml")
    with pytest.raises(UserError, match=r"unknown key model.backbone.rope_reset \(.*mine.yaml:"):
        load_config(tmp_path / "mine.yaml")
