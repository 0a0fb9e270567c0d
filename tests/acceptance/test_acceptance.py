"""`bitlm doctor --accept` from end to end on the CPU."""

import json
import os
import subprocess
import sys

import pytest

from bitlm_dist.acceptance.checks import ATTENTION
from bitlm_dist.acceptance.sizes import RECIPES, SIZES

SIZE = SIZES["cpu"]
COMMAND = [sys.executable, "-m", "bitlm_dist", "doctor", "--accept", "OUT", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accept")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        COMMAND, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    record = json.loads((folder / "OUT" / "gpu-cpu.json").read_text())
    failed = [
        (r["name"], r["reason"], r["output"]) for r in record["results"] if r["status"] == "failed"
    ]
    assert done.returncode == 0, (failed, done.stdout, done.stderr)
    return folder / "OUT", record, done.stdout


@pytest.mark.slow
@pytest.mark.integration
def test_every_check_is_made_that_a_cpu_can_make(made):
    out, record, printed = made
    status = {result["name"]: result["status"] for result in record["results"]}
    skipped = {name for name, word in status.items() if word == "skipped"}
    may_lack = {f"attention: {name}" for name in ATTENTION} - {
        "attention: merge",
        "attention: reference",
    }
    assert skipped <= may_lack | {"training: fp8", "tests on GPUs"}
    assert record["state"] == "complete"
    assert all(name in printed for name in status)
    # data and runs are gone
    assert sorted(file.name for file in out.iterdir()) == ["gpu-cpu.json", "gpu-cpu.md"]


@pytest.mark.slow
@pytest.mark.integration
def test_the_numbers_are_those_of_the_runs(made):
    out, record, _ = made
    numbers = {result["name"]: result["numbers"] for result in record["results"]}
    for name in RECIPES:
        run = numbers[f"training: {name}"]
        assert run["steps"] == SIZE.steps
        assert run["tokens_per_second"] > 0
        assert run["peak_bytes"] is None
        prediction = numbers["prediction"][f"training: {name}"]
        assert prediction["peak_bytes"] > prediction["static_bytes"] > 0

    num_steps, every, before_kill = SIZE.compared_steps
    resumed = numbers["kill -9 and resume"]
    assert resumed["steps_equal"] == num_steps
    assert before_kill <= resumed["killed_at_step"] < num_steps
    assert f"step-{every:08d}" in resumed["saved"]
    assert numbers["two cards: TP2"]["steps_compared"] == num_steps
    assert [numbers[f"generation: batch {batch}"]["batch"] for batch in (1, 16)] == [1, 16]

    page = (out / "gpu-cpu.md").read_text()
    sections = ("Machine", "Checks", "Training", "Generation", "Attention")
    assert all(f"\n## {section}\n" in page for section in sections)
