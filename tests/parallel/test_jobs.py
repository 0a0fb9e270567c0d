"""Whole jobs of several processes: a run that changes its layout, and one of which a rank dies."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from bitlm_dist.training.trainer import Trainer
from bitlm_dist.training.weights import load_trained


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


SP = ["--parallel.tensor", "2", "--parallel.sequence", "true"]
CP = ["--parallel.context", "2"]
CHANGES = [
    ("muon", "fp32", SP, ["--parallel.pipeline", "2"]),
    ("adamw", "fp32", [], CP),  # Megatron's distributed optimizer
    ("adamw", "bf16", CP, SP),  # the same, and whole tensors
    ("muon", "fp32", ["--head.zero_stage", "3"], ["--head.engine", "fsdp2"]),
    ("adamw", "bf16", ["--head.engine", "fsdp2", "--head.zero_stage", "3"], ["--head.zero_stage", "3"]),
]


@pytest.mark.parametrize(("matrices", "precision", "first", "second"), CHANGES)
def test_a_run_goes_on_under_another_layout(matrices, precision, first, second, tiny, tmp_path):
    """Two ranks, two ranks of another layout, then one process: the losses of one process that was never stopped."""
    settings = ["--training.steps", "8", "--optimizer.matrices", matrices, "--optimizer.weight_decay", "0.1"]
    settings += ["--training.precision", precision, "--optimizer.ema", "0.5"]
    common = [*settings, "--data.path", str(tiny().data.path)]
    whole = Trainer(tiny(*settings, "--run.dir", str(tmp_path / "whole")))
    whole.fit()
    whole.close()
    run = str(tmp_path / "run")
    for number, (until, words) in enumerate(((3, first), (6, second))):
        folder = tmp_path / str(number)
        folder.mkdir()
        run_ranks(2, "parity", "fit", str(tiny.file), [*common, "--run.dir", run, *words], until, folder=folder, timeout=100)
    last = Trainer(tiny(*settings, "--run.dir", run))
    assert last.step == 6
    last.fit()
    last.close()
    near, close = {"fp32": (1e-5, 1e-4), "bf16": (1e-3, 2e-2)}[precision]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=near)
    for averaged in ("false", "true"):
        config = tiny(*settings, "--evaluation.averaged", averaged)
        (_, expected, _), (_, model, step) = (load_trained(tmp_path / name, config) for name in ("whole", "run"))
        assert step == 8
        for a, b in zip(expected.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=close)


def test_two_data_ranks_learn_from_a_teacher_what_one_process_learns(tiny, tmp_path):
    teacher = Trainer(tiny("--model.output", "softmax", "--run.dir", str(tmp_path / "teacher")))
    teacher.fit()
    teacher.close()
    settings = ["--training.steps", "4", "--distillation.teacher", str(tmp_path / "teacher")]
    whole = Trainer(tiny(*settings, "--run.dir", str(tmp_path / "whole")))
    whole.fit()
    whole.close()
    common = [*settings, "--data.path", str(tiny().data.path), "--run.dir", str(tmp_path / "run")]
    (tmp_path / "ranks").mkdir()
    run_ranks(2, "parity", "fit", str(tiny.file), common, 4, folder=tmp_path / "ranks", timeout=100)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


JOB = """
import sys, torch
import bitlm_dist.cli
from bitlm_dist.__main__ import main

def app(**settings):
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("disk on fire")
    torch.distributed.all_reduce(torch.zeros(1))

bitlm_dist.cli.app = app
main()
"""


HEAD_JOB = """
import torch
from bitlm_dist.__main__ import main
from bitlm_dist.parallel.zero_head import ZeroHead

def begin(self, last):
    if torch.distributed.get_rank() == 3:
        raise RuntimeError("head on fire")

ZeroHead.begin = begin
main()
"""


def run_job(script: Path, ranks: int, words: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", str(script), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)
    print(f"{time.monotonic() - began:.0f} s\n{result.stderr}")
    return result


@pytest.mark.parametrize(("job", "ranks", "failed"), [(JOB, 3, "1"), (HEAD_JOB, 4, "3")], ids=["any", "head"])
def test_a_rank_that_dies_is_named_once_and_ends_the_job(job, ranks, failed, tiny, tmp_path):
    """The second is a rank of the sharded head: ranks of the first stage wait for its gradients."""
    script = tmp_path / "job.py"
    script.write_text(job)
    words = ["train", str(tiny.file), "--data.path", str(tiny().data.path), "--run.dir", str(tmp_path / "run")]
    result = run_job(script, ranks, [*words, "--parallel.pipeline", "2"], timeout=90)
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("bitlm:")]
    assert len(said) == 1
    assert said[0].startswith(f"bitlm: rank {failed} on ")
    assert said[0].endswith("on fire")
