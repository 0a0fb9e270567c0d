"""Complete runs on a real Slurm: `bitlm launch slurm` as a user calls it, with time limits,
signals, preemption and failing nodes.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch

from bitlm_dist.__main__ import main
from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.config_loading import load_config
from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import Outcome
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.slurm
SIGNAL_LEAD = 25
CLUSTER = """
python: {python}
signal_before_timeout: {lead}
save_seconds: 5
max_restarts: 2
restart_backoff: 2
env: {{OMP_NUM_THREADS: "1"}}
preflight: {{enabled: {preflight}, disk_gb: 0.01, gemm: 0, bandwidth: 0, seconds: 15}}
watch: {{heartbeat_interval: 0.5, heartbeat_timeout: 6, step_timeout: 100, startup_timeout: 100}}
"""


class Launcher:
    """The command `bitlm launch` on a test cluster, and the run that it starts."""

    def __init__(self, cluster, folder: Path, data: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.run = folder / "run"
        self._data = data
        self.job = ""

    def ask(self, *words, code=0, **environment):
        """Run the command in this process, as only its jobs need other ones; return its output."""
        said = io.StringIO()
        argv = ["bitlm", "launch", *map(str, words)]
        environment = {**self.cluster.environment, "COLUMNS": "200", **environment}
        with (
            redirect_stdout(said),
            redirect_stderr(said),
            mock.patch("sys.argv", argv),
            mock.patch.dict(os.environ, environment),
            pytest.raises(SystemExit) as exit,
        ):
            main()
        assert exit.value.code == code, said.getvalue()
        return said.getvalue()

    def words(self, *overrides):
        # a step is a fraction of a second, and nothing is evaluated on the way
        small = ("--training.global_batch_tokens", "512", "--evaluation.every_steps", "0")
        return ["quickstart", "--run.dir", self.run, "--data.path", self._data, *small, *overrides]

    def file(self, preflight=False, more=""):
        file = self.folder / "cluster.yaml"
        settings = {
            "python": sys.executable,
            "lead": SIGNAL_LEAD,
            "preflight": str(preflight).lower(),
        }
        file.write_text(CLUSTER.format(**settings) + more)
        return file

    def submit(self, nodes, *overrides, preflight=False):
        options = ("--nodes", nodes, "--cluster", self.file(preflight), "--time", "0:10:00")
        self.job = _job_in(self.ask("slurm", *self.words(*overrides), *options))

    def resume(self):
        self.job = _job_in(self.ask("resume", self.run))

    def until(self, what, seconds=400):
        """Wait until ``what()`` is true, and return it."""
        end = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < end, self.story()
            time.sleep(0.05)
        return found

    def finish(self, state="COMPLETED", seconds=400):
        try:
            assert self.cluster.wait(self.job, {state}, timeout=seconds) == state
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def story(self):
        logs = [
            *(self.run / "launch").glob("job-*.log"),
            *(self.run / "launch").glob("attempts/*/logs/rank-0.log"),
        ]
        return "\n".join(f"--- {log}\n{log.read_text()[-1500:]}" for log in logs)

    def steps(self):
        file = self.run / "metrics.jsonl"
        return (
            [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
            if file.is_file()
            else []
        )

    def steps_done(self):
        return len(self.steps())

    def times_stopped(self):
        return sum(attempt.outcome == Outcome.STOPPED for attempt in self.attempts())

    def at_step(self, step):
        return self.until(lambda: len(self.steps()) >= step)

    def saved_after(self, step):
        """Wait for a save after ``step``: the attempt that began there trains.

        The metrics do not tell, as the attempt before it may have reached later steps.
        """
        self.until(lambda: max(complete_steps(self.run / "checkpoints"), default=0) > step)

    def signal(self):
        """Send the signal that Slurm sends before the time limit."""
        self.cluster.run("scancel", "--batch", "--signal=USR2", self.job)

    def let_time_run_out(self):
        """Move the time limit as close as possible: the controller looks every 30 s."""
        end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + SIGNAL_LEAD + 31))
        self.cluster.run("scontrol", "update", f"JobId={self.job}", f"EndTime={end}")

    def attempts(self):
        return attempts.read_attempts(self.run)

    def begun(self, number):
        return self.until(lambda: len(self.attempts()) >= number)

    def log(self):
        return "".join(log.read_text() for log in sorted((self.run / "launch").glob("job-*.log")))

    def whole(self, *overrides, until=None):
        """Losses of an undisturbed run in this process, until a step."""
        words = [*self.words(*overrides), "--run.dir", self.folder / "whole"]

        # as in the job: the number of threads changes the order of sums
        torch.set_num_threads(1)
        trainer = Trainer.build(
            load_config(Path(words[0]), list(map(str, words[1:]))).config
        ).open()
        trainer.fit(until)
        trainer.close()
        torch.set_num_threads(os.cpu_count() or 1)
        return [
            json.loads(line)["loss"]
            for line in (self.folder / "whole" / "metrics.jsonl").read_text().splitlines()
        ]


def _job_in(said):
    return said.partition(": job ")[2].replace(";", ",").partition(",")[0]


@pytest.fixture
def launcher(cluster, tmp_path, sample_data):
    return Launcher(cluster, tmp_path, sample_data)


def losses(launcher, count):
    assert [entry["step"] for entry in launcher.steps()] == list(range(1, count + 1)), (
        "each step once"
    )
    return [entry["loss"] for entry in launcher.steps()]


@pytest.mark.parametrize("nodes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_nodes_train_what_one_process_trains(nodes, launcher):
    words = (
        "--training.steps",
        "12",
        "--checkpoint.every_steps",
        "5",
        "--training.global_batch_tokens",
        "1024",
    )
    launcher.submit(nodes, *words, preflight=True)
    launcher.finish()
    assert losses(launcher, 12) == pytest.approx(launcher.whole(*words), rel=1e-5)
    (only,) = launcher.attempts()
    assert (only.outcome, only.nodes, only.job) == (
        Outcome.DONE,
        tuple(launcher.cluster.names[:nodes]),
        launcher.job,
    )
    measured = [
        json.loads(file.read_text())
        for file in (launcher.run / "launch/attempts/0001/nodes").glob("n?.json")
    ]
    assert len(measured) == nodes
    assert all(
        node["error"] == "" and node["clock"] and node["bandwidth"] and node["gemm"]
        for node in measured
    )
    assert len(list((launcher.run / "launch/attempts/0001/logs").iterdir())) == nodes
    status = json.loads(launcher.ask("status", launcher.run, "--json"))
    assert (status["state"], status["step"], status["checkpoint"]) == ("COMPLETED", 12, 12)
    assert "step 12/12" in launcher.ask("logs", launcher.run, "--rank", "0")
    assert json.loads((launcher.run / "launch" / "code.json").read_text())["version"]


@pytest.mark.parametrize(
    "limits", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.long)]
)
def test_the_time_limit_is_met_and_no_step_is_lost(limits, launcher):
    # it must not end before its time limit
    words = ("--training.steps", "100000", "--checkpoint.every_steps", "0")
    launcher.submit(1, *words)
    for stopped in range(limits):
        launcher.begun(stopped + 1)
        launcher.at_step(launcher.steps_done() + 5)
        launcher.let_time_run_out()
        launcher.until(lambda before=stopped: launcher.times_stopped() > before)
        launcher.cluster.run(
            "scontrol", "update", f"JobId={launcher.job}", "TimeLimit=10"
        )  # minutes
    launcher.begun(limits + 1)
    launcher.at_step(launcher.steps_done() + 3)
    launcher.ask("cancel", launcher.run)
    launcher.finish()
    *found, last = launcher.attempts()
    assert [a.outcome for a in found] == [Outcome.STOPPED] * limits
    assert [a.restart for a in (*found, last)] == list(range(limits + 1))
    assert all(a.reason.startswith("the time limit or preemption, saved at step ") for a in found)
    assert [a.checkpoint for a in (*found[1:], last)] == [a.reached for a in found]
    assert losses(launcher, last.reached) == launcher.whole(*words, until=last.reached)


@pytest.mark.slow
def test_signals_at_bad_moments_cancel_resume_and_preemption_lose_nothing(launcher):
    words = (
        "--training.steps",
        "30",
        "--checkpoint.every_steps",
        "1",
        "--evaluation.every_steps",
        "10",
    )
    words = (*words, "--evaluation.num_sequences", "16", "--evaluation.num_noise_levels", "2")
    launcher.submit(1, *words)
    launcher.begun(1)
    launcher.signal()  # in the first second: nothing listens yet but the batch script
    launcher.begun(2)
    launcher.at_step(3)

    # during a save
    launcher.until(lambda: list((launcher.run / "checkpoints").glob(".step-*.partial")))
    launcher.signal()
    launcher.begun(3)
    launcher.at_step(10)
    launcher.signal()  # during the evaluation
    launcher.begun(4)
    launcher.at_step(13)
    launcher.ask("cancel", launcher.run)
    launcher.finish()
    assert launcher.attempts()[-1].outcome == Outcome.STOPPED
    launcher.resume()
    launcher.begun(5)
    launcher.at_step(launcher.attempts()[-1].checkpoint + 2)
    other = launcher.cluster.submit(
        "sleep 2",
        "--partition=high",
        "--nodes=4",
        "--exclusive",
        output=launcher.folder / "high.log",
    )
    launcher.cluster.wait(other)
    launcher.finish()
    found = launcher.attempts()
    assert [a.outcome for a in found] == [*[Outcome.STOPPED] * 5, Outcome.DONE]
    assert found[0].reached < 3, "it stopped as soon as it could"
    assert found[-1].checkpoint == found[-2].reached
    assert losses(launcher, 30) == launcher.whole(*words)
    evaluations = (launcher.run / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluations] == [10, 20, 30]


@pytest.mark.slow
def test_a_lost_node_and_a_hanging_rank_are_named_and_the_run_goes_on(launcher):
    words = ("--training.steps", "60", "--checkpoint.every_steps", "2")
    launcher.submit(2, *words)
    launcher.at_step(5)
    nodes = sorted(launcher.cluster.pids(launcher.job))
    assert len(nodes) == 2
    launcher.cluster.kill_node(int(nodes[1][1:]))
    launcher.until(lambda: launcher.cluster.show(launcher.job)["JobState"] != "RUNNING")
    noticed = time.monotonic()
    launcher.until(lambda: launcher.attempts()[-1].restart == 1)
    launcher.saved_after(launcher.attempts()[-1].checkpoint)
    print(f"trains again {time.monotonic() - noticed:.0f} s after Slurm noticed")
    *lost, again = launcher.attempts()
    assert {a.outcome for a in lost} <= {Outcome.FAILED, Outcome.LOST}, (
        "the other rank may notice before Slurm does"
    )
    assert nodes[1] not in again.nodes
    node = again.nodes[1]
    (process,) = launcher.cluster.pids(launcher.job)[node]
    os.kill(process, signal.SIGSTOP)
    expected = launcher.whole(*words)  # until the launcher notices
    launcher.begun(again.number + 1)
    hung = launcher.attempts()[again.number - 1]
    assert hung.outcome == Outcome.HUNG
    assert hung.reason.startswith(f"rank 1 on {node} gave no sign of life for ")
    launcher.finish()
    assert launcher.attempts()[-1].outcome == Outcome.DONE
    assert losses(launcher, 60) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_run_that_diverges_is_given_up_at_once(launcher):
    words = (
        "--optimizer.adamw_lr",
        "1e30",
        "--training.steps",
        "60",
        "--checkpoint.every_steps",
        "0",
    )
    launcher.submit(1, *words, "--max-restarts", "1")
    launcher.finish("FAILED")
    assert [a.outcome for a in launcher.attempts()] == [Outcome.DIVERGED]
    assert (
        "loss or gradient norm was not finite in 20 steps in a row, up to step"
        in launcher.log().splitlines()[-1]
    )
    assert launcher.cluster.show(launcher.job)["Restarts"] == "0"


def test_what_cannot_work_is_refused_before_the_queue(launcher):
    options = ("--cluster", launcher.file(), "--time", "0:10:00")
    for words, message in (
        (("--partition", "nowhere"), "invalid partition specified"),
        (
            ("--nodes", "8", "--training.global_batch_tokens", "2048"),
            "Requested node configuration is not available",
        ),
        (
            ("--time", "0:01:25"),
            "leaves no time to train: it must be above signal_before_timeout",
        ),
    ):
        said = launcher.ask("slurm", *launcher.words(), *options, *words, code=2)
        assert message in said
        assert len(said.splitlines()) == 1
        assert not launcher.run.exists()
    launcher.file(more="gpus_per_node: 2\n")
    assert "sbatch: " in launcher.ask("slurm", *launcher.words(), *options, code=2)
    script = launcher.ask("slurm", *launcher.words(), *options, "--dry-run")
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=bitlm-run\n")
    said = launcher.ask("slurm", *launcher.words(), *options, code=2, PATH=str(launcher.folder))
    assert "is not on the path: launch from a login node" in said
    assert not launcher.run.exists()


@contextmanager
def hidden_from(name, launcher):
    """Hide the run folder from a node."""
    inside = ["nsenter", "-t", str(launcher.cluster.slurmd_pid(name)), "-m"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "none", str(launcher.folder)], check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, "umount", str(launcher.folder)], check=True)


@pytest.mark.slow
def test_a_broken_node_is_named_and_left_out_from_then_on(launcher):
    words = ("--training.steps", "5", "--training.global_batch_tokens", "1536")
    with hidden_from("n1", launcher):
        launcher.submit(3, *words, preflight=True)
        launcher.finish()
    (first,) = [attempt for attempt in launcher.attempts() if attempt.number == 1]
    assert (first.outcome, first.reason) == (Outcome.BAD_NODES, "n1: no measurements within 15 s")
    launcher.job = launcher.until(
        lambda: (launcher.run / "launch" / "jobs").read_text().split()[1:]
    )[0]
    assert launcher.cluster.show(launcher.job)["ExcNodeList"] == "n1"
    assert "n1" in json.loads(launcher.ask("status", launcher.run, "--json"))["excluded"]
    launcher.finish()
    assert launcher.attempts()[-1].nodes == ("n0", "n2", "n3")


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared_ends_the_job(launcher):
    with hidden_from("n1", launcher):
        launcher.submit(2, "--training.steps", "5")
        launcher.finish("FAILED")
    (only,) = launcher.attempts()
    assert only.outcome == Outcome.REFUSED
    assert (
        f"{launcher.run}/launch/attempts/0001 is not there on n1: choose a run.dir"
        in launcher.log()
    )
