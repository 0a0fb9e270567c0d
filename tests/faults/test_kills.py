"""kill -9 at random moments: the run must end as an undisturbed one does.

`make test-long` kills 30 times and prints the table of docs/measured/kills.md.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from ranks import start_job

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint.diff import compare_tensors, compare_train_states
from bitlm_dist.checkpoint.steps import complete_steps, folder_of

pytestmark = pytest.mark.distributed
RANKS = 2
BATCH = 4  # sequences
TIMEOUT = 120  # seconds that anything may take
# What the job is doing when it is killed, and which of its ranks are. Completing and removing
# checkpoints is rank 0's work and takes milliseconds.
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
SIGNS = {
    "saving": ".step-*.partial",
    "completing": ".step-*.partial/state.json",
    "removing": ".step-*.removed",
}
GRACE = 10.0  # seconds from the launcher's SIGTERM to its SIGKILL


@dataclass
class Job:
    """The ranks of one start, which the launcher ends once one of them is gone."""

    ranks: list[ForkServerProcess]

    def ended(self) -> bool:
        """True if a rank is gone, killed or not."""
        return any(rank.exitcode is not None for rank in self.ranks)

    def wait(self) -> list[int | None]:
        """Wait for all ranks, ending them once one has failed, as a launcher does.

        Returns:
            The exit codes.
        """
        end = time.monotonic() + 10 * TIMEOUT
        while any(rank.exitcode is None for rank in self.ranks) and time.monotonic() < end:
            if any(rank.exitcode for rank in self.ranks):
                for rank in self.ranks:
                    rank.terminate()
                for rank in self.ranks:
                    rank.join(GRACE)
                self.kill()
            time.sleep(0.01)
        return [rank.exitcode for rank in self.ranks]

    def kill(self) -> None:
        """Kill all ranks at once."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()


@dataclass
class Run:
    """A quickstart-sized job of two ranks that saves after every step."""

    folder: Path
    data: Path
    steps: int
    jobs: list[Job] = field(default_factory=list)

    def start(self) -> Job:
        words = [
            "train",
            "quickstart",
            "--data.path",
            str(self.data),
            "--run.dir",
            str(self.folder),
        ]
        words += [
            "--training.steps",
            str(self.steps),
            "--training.global_batch_tokens",
            str(256 * BATCH),
        ]
        words += ["--checkpoint.every_steps", "1", "--logging.tensorboard", "false"]
        words += ["--evaluation.every_steps", "0"]
        self.logs.mkdir(exist_ok=True)
        self.jobs.append(Job(start_job(RANKS, "ranks.run_command_line", words, folder=self.logs)))
        return self.jobs[-1]

    @property
    def logs(self) -> Path:
        return self.folder.parent / f"{self.folder.name}-logs"

    @property
    def log(self) -> str:
        """Rank 0's output over all starts."""
        file = self.logs / "log.0"
        return file.read_text() if file.is_file() else ""

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def lines(self) -> list[dict]:
        """The metrics on complete lines."""
        file = self.folder / "metrics.jsonl"
        return (
            [json.loads(line) for line in file.read_text().split("\n")[:-1]]
            if file.is_file()
            else []
        )

    def wait(self, ready: Callable[[], object], job: Job, poll: float = 0.001) -> None:
        end = time.monotonic() + TIMEOUT
        while not ready():
            assert not job.ended(), f"the job ended by itself:\n{self.log[-3000:]}"
            assert time.monotonic() < end, "timed out"
            time.sleep(poll)


@dataclass
class Kill:
    """A kill and its consequences."""

    moment: str
    target: str
    began: int | None  # step that the job resumed from; None: it was killed before it said so
    step: int  # the last one recorded
    left: str  # partial checkpoints
    whole: int  # step of the latest complete checkpoint


def strike(run: Run, moment: str, target: str, rng: random.Random) -> Kill:
    """Start the job, wait for the moment, kill the target, and wait for the job's end."""
    before = newest(run)
    said = len(run.log)
    job = run.start()
    if moment == "starting":
        time.sleep(rng.uniform(0.0, 3.0))
    else:
        run.wait(lambda: newest(run) > before, job)

    victims = job.ranks if target == "job" else [job.ranks[int(target[-1])]]
    if moment == "stepping":
        time.sleep(rng.uniform(0.0, 1.2))
    elif moment in SIGNS:
        run.wait(lambda: list(run.checkpoints.glob(SIGNS[moment])), job, poll=0.0002)
        time.sleep(rng.uniform(0.0, 0.05 if moment == "saving" else 0.001))

    for rank in victims:
        rank.kill()
    job.wait()

    lines = run.lines()
    step = lines[-1]["step"] if lines else 0
    return Kill(
        moment,
        target,
        begun(run.log[said:]),
        step,
        left_in(run.checkpoints) or "nothing",
        newest(run),
    )


def begun(said: str) -> int | None:
    """The step that a start resumed from, according to its output."""
    steps = [
        int(line.split("step ")[1].split()[0])
        for line in said.splitlines()
        if " parameters, step " in line
    ]
    return steps[0] if steps else None


def left_in(checkpoints: Path) -> str:
    """Partial checkpoints, which were being written or removed, with their files."""
    hidden = [path for path in sorted(checkpoints.glob(".step-*")) if path.is_dir()]
    return "; ".join(
        f"{path.name}: {', '.join(sorted(p.name.partition('.')[0] for p in path.iterdir()))}"
        for path in hidden
    )


def newest(run: Run) -> int:
    return max(complete_steps(run.checkpoints), default=0)


@pytest.fixture
def runs(tmp_path, sample_data, kills):
    made = [
        Run(tmp_path / name, sample_data, steps=4 * kills + 4) for name in ("undisturbed", "killed")
    ]
    yield made
    for run in made:
        for job in run.jobs:
            job.kill()


@pytest.mark.parametrize(
    "kills", [2, pytest.param(6, marks=pytest.mark.slow), pytest.param(30, marks=pytest.mark.long)]
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(kills, runs, seed):
    (undisturbed, killed) = runs
    steps = runs[0].steps
    job = undisturbed.start()
    assert job.wait() == [0] * RANKS, undisturbed.log[-3000:]

    rng = random.Random(seed)
    struck = []
    for number in range(kills):
        struck.append(strike(killed, *MOMENTS[number % len(MOMENTS)], rng))
        for step in complete_steps(killed.checkpoints):
            store.verify(folder_of(killed.checkpoints, step))  # raises if one is damaged

    said = len(killed.log)
    job = killed.start()
    assert job.wait() == [0] * RANKS, killed.log[-3000:]

    began = begun(killed.log[said:])
    show(struck, undisturbed, killed)
    for kill, before in zip(struck, [0, *(kill.whole for kill in struck)], strict=False):
        assert kill.began in (None, before), "every start goes on from the newest checkpoint"
    assert began == struck[-1].whole

    for run in runs:
        assert [line["step"] for line in run.lines()] == list(range(1, steps + 1))
        assert [line["sequences"] for line in run.lines()] == [
            BATCH * step for step in range(1, steps + 1)
        ], "each sequence once"

    assert [line["loss"] for line in killed.lines()] == [
        line["loss"] for line in undisturbed.lines()
    ], "bitwise"

    ends = [folder_of(run.checkpoints, steps) for run in runs]
    assert compare_tensors(*ends)[1] == []
    assert compare_train_states(*ends).keys() <= {"run.dir"}
    assert not [path for path in killed.checkpoints.glob(".*") if path.name != ".latest"]


def show(kills: list[Kill], undisturbed: Run, killed: Run) -> None:
    print("\n| kill | while | killed | last step on record | left half done | newest checkpoint |")
    print(f"|{'---|' * 6}")
    for number, kill in enumerate(kills, 1):
        cells = (number, kill.moment, kill.target, kill.step, kill.left, kill.whole)
        print(f"| {' | '.join(map(str, cells))} |")

    losses = [run.lines()[-1]["loss"] for run in (undisturbed, killed)]
    print(
        f"\nloss of the last step ({undisturbed.steps}): "
        f"undisturbed {losses[0]!r}, killed {losses[1]!r}"
    )
