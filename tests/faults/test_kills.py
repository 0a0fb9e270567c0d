"""kill -9 at random moments: what a run has lost when it ends, compared with one that nobody disturbed.

``make faults`` kills 30 times and prints the table that docs/reliability.md shows; `FAULT_KILLS` sets the number.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint.diff import compare, compare_states

KILLS = int(os.environ.get("FAULT_KILLS", "6"))
RANKS = 2
STEPS = 4 * KILLS + 4
TIMEOUT = 120  # seconds that anything may take
# what is going on when the kill comes, and whom it hits; rank 0 completes and removes, which takes milliseconds
MOMENTS = [
    ("saving", "rank 1"),
    ("completing", "job"),
    ("stepping", "rank 0"),
    ("removing", "rank 0"),
    ("starting", "job"),
    ("saving", "rank 0"),
    ("stepping", "rank 1"),
    ("completing", "rank 0"),
    ("saving", "job"),
    ("removing", "job"),
]
SIGNS = {"saving": ".step-*.partial", "completing": ".step-*.partial/state.json", "removing": ".step-*.removed"}
ROOT = Path(__file__).parent.parent.parent


@dataclass
class Run:
    """A quickstart-sized job of two ranks that saves after every step."""

    folder: Path
    data: Path
    jobs: list[subprocess.Popen] = field(default_factory=list)

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--standalone"]
        command += ["-m", "bitlm_dist", "train", "quickstart", "--data.path", str(self.data), "--run.dir", str(self.folder)]
        command += ["--training.steps", str(STEPS), "--checkpoint.every_steps", "1", "--logging.tensorboard", "false"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.data.parent)}
        with (self.folder.parent / f"{self.folder.name}.log").open("a") as log:
            job = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
        self.jobs.append(job)
        return job

    @property
    def log(self) -> str:
        file = self.folder.parent / f"{self.folder.name}.log"
        return file.read_text() if file.is_file() else ""

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def lines(self) -> list[dict]:
        """Metrics of whole lines."""
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.is_file() else []

    def wait(self, ready: Callable[[], object], job: subprocess.Popen, poll: float = 0.001) -> None:
        end = time.monotonic() + TIMEOUT
        while not ready():
            assert job.poll() is None, f"the job ended by itself:\n{self.log[-3000:]}"
            assert time.monotonic() < end, "timed out"
            time.sleep(poll)

    def end(self) -> None:
        for job in self.jobs:
            if job.poll() is None:
                for process in [*psutil.Process(job.pid).children(recursive=True), job]:  # each rank has a session of its own
                    process.kill()
                job.wait()


@dataclass
class Kill:
    """What was killed when, and what it left."""

    moment: str
    target: str
    began: int | None  # step that the job went on from; None: it was killed before it said so
    step: int  # the last on record
    left: str
    whole: int  # step of the newest checkpoint


def rank_of(job: subprocess.Popen, rank: int) -> psutil.Process | None:
    for process in psutil.Process(job.pid).children():
        try:
            if process.environ().get("LOCAL_RANK") == str(rank):
                return process
        except psutil.Error:
            continue
    return None


def strike(run: Run, moment: str, target: str, rng: random.Random) -> Kill:
    """Start the job, wait for the moment, kill the target, wait until all of the job is gone."""
    before, said = newest(run), len(run.log)
    job = run.start()
    run.wait(lambda: rank_of(job, RANKS - 1), job)
    if moment == "starting":
        time.sleep(rng.uniform(0.0, 3.0))
    else:
        run.wait(lambda: newest(run) > before, job)
    victim = None if target == "job" else rank_of(job, int(target[-1]))
    if moment == "stepping":
        time.sleep(rng.uniform(0.0, 1.2))
    elif moment in SIGNS:
        run.wait(lambda: list(run.checkpoints.glob(SIGNS[moment])), job, poll=0.0)
        time.sleep(rng.uniform(0.0, 0.05 if moment == "saving" else 0.001))
    whole = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in whole if victim is None else [victim]:
        process.kill()
    job.wait(TIMEOUT)
    assert not psutil.wait_procs(whole, TIMEOUT)[1]
    lines = run.lines()
    step = lines[-1]["step"] if lines else 0
    return Kill(moment, target, begun(run.log[said:]), step, left_in(run.checkpoints) or "nothing", newest(run))


def begun(said: str) -> int | None:
    """The step that a start went on from, from what it said."""
    steps = [int(line.split("step ")[1].split()[0]) for line in said.splitlines() if " parameters, step " in line]
    return steps[0] if steps else None


def left_in(checkpoints: Path) -> str:
    """What is there of checkpoints that were being written or removed."""
    hidden = [path for path in sorted(checkpoints.glob(".step-*")) if path.is_dir()]
    return "; ".join(f"{path.name}: {', '.join(sorted(p.name.partition('.')[0] for p in path.iterdir()))}" for path in hidden)


def newest(run: Run) -> int:
    return max(store.complete_steps(run.checkpoints), default=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    data = root / "data"
    corpus = ROOT / "data_prep" / "sample" / "kjv.jsonl.zst"
    command = [sys.executable, "-m", "bitlm_dist", "prep", str(corpus), "--tokenizer", "bpe:4096", "--out", str(data)]
    subprocess.run(command, check=True, capture_output=True)
    made = Run(root / "undisturbed", data), Run(root / "killed", data)
    yield made
    for run in made:
        run.end()


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(runs, seed):
    undisturbed, killed = runs
    job = undisturbed.start()
    assert job.wait(10 * TIMEOUT) == 0, undisturbed.log[-3000:]
    rng, kills = random.Random(seed), []
    for number in range(KILLS):
        kills.append(strike(killed, *MOMENTS[number % len(MOMENTS)], rng))
        for step in store.complete_steps(killed.checkpoints):
            store.verify(store.folder_of(killed.checkpoints, step))  # whatever is there is whole
    said = len(killed.log)
    job = killed.start()
    assert job.wait(10 * TIMEOUT) == 0, killed.log[-3000:]
    began = begun(killed.log[said:])
    show(kills, undisturbed, killed)
    for kill, before in zip(kills, [0, *(kill.whole for kill in kills)], strict=False):
        assert kill.began in (None, before), "every start goes on from the newest checkpoint"
    assert began == kills[-1].whole
    for run in runs:
        assert [line["step"] for line in run.lines()] == list(range(1, STEPS + 1))
        assert [line["sequences"] for line in run.lines()] == [8 * step for step in range(1, STEPS + 1)], "each sequence once"
    assert [line["loss"] for line in killed.lines()] == [line["loss"] for line in undisturbed.lines()], "bitwise"
    ends = [store.folder_of(run.checkpoints, STEPS) for run in runs]
    assert compare(*ends)[1] == []
    assert compare_states(*ends).keys() <= {"run.dir"}
    assert not [path for path in killed.checkpoints.glob(".*") if path.name != ".latest"]


def show(kills: list[Kill], undisturbed: Run, killed: Run) -> None:
    print("\n| kill | while | killed | last step on record | left half done | newest checkpoint |")
    print(f"|{'---|' * 6}")
    for number, kill in enumerate(kills, 1):
        print(f"| {number} | {kill.moment} | {kill.target} | {kill.step} | {kill.left} | {kill.whole} |")
    losses = [run.lines()[-1]["loss"] for run in (undisturbed, killed)]
    print(f"\nloss of the last step ({STEPS}): undisturbed {losses[0]!r}, killed {losses[1]!r}")
