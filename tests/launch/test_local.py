"""`bitlm launch local` as a real command: killed and stopped ranks, runs that fail every time or
diverge, Ctrl-C.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from bitlm_dist.errors import UserError
from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import Outcome
from bitlm_dist.launch.status import read_log_tail, status_of
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.distributed
CLUSTER = (
    "watch: {heartbeat_interval: 0.2, heartbeat_timeout: 6, "
    "step_timeout: 120, startup_timeout: 120}\n"
    "max_restarts: 1\nrestart_backoff: 1\nenv: {OMP_NUM_THREADS: '1'}\n"
)


@pytest.fixture
def launch(tiny, prepared, tmp_path):
    """Function (ranks, overrides) that starts `bitlm launch local`."""
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    begun = []

    def make(ranks, *overrides):
        words = [
            str(tiny.file),
            "-n",
            str(ranks),
            "--cluster",
            str(tmp_path / "cluster.yaml"),
            "--data.path",
            str(prepared),
        ]
        command = [
            sys.executable,
            "-m",
            "bitlm_dist",
            "launch",
            "local",
            *words,
            "--run.dir",
            str(tmp_path / "run"),
            *overrides,
        ]
        # leftovers of killed processes are removed with the test's folder
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        begun.append(subprocess.Popen(command, text=True, env=environment, **streams))
        return begun[-1]

    yield make
    for process in begun:
        process.kill()
        process.communicate()


def until(what, process, seconds=300):
    """Wait until ``what()`` is true and return it. The launcher must stay alive."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def beat_of(run, number, rank, step):
    """Heartbeat of a rank, once it has completed ``step`` steps; until then None."""
    try:
        beat = json.loads(
            (attempts.attempt_folder(run, number) / "beats" / f"rank-{rank}").read_text()
        )
    except OSError:
        return None
    return beat if beat["step"] >= step else None


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_ranks_that_die_or_freeze_are_named_and_the_run_ends_as_if_none_had(launch, tiny, tmp_path):
    run, words = tmp_path / "run", ("--training.steps", "60", "--checkpoint.every_steps", "5")
    process = launch(2, *words)
    os.kill(until(lambda: beat_of(run, 1, 1, 7), process)["process"], signal.SIGKILL)
    os.kill(until(lambda: beat_of(run, 2, 0, 12), process)["process"], signal.SIGSTOP)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    first, second, third = attempts.read_attempts(run)
    assert (first.outcome, second.outcome, third.outcome) == (
        Outcome.FAILED,
        Outcome.HUNG,
        Outcome.DONE,
    )
    assert second.reason.startswith("rank 0 on ")
    assert "gave no sign of life for" in second.reason
    assert (third.checkpoint, third.reached) == (second.reached, 60)
    assert "attempt 2: hung: rank 0 on" in output
    assert "step 60/60" in output, "what rank 0 prints is shown"
    whole = Trainer(tiny(*words, "--run.dir", str(tmp_path / "whole")))
    whole.fit()
    whole.close()
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    status = status_of(run)
    assert (status.state, status.attempts, status.step, status.checkpoint, status.seconds_left) == (
        "ended",
        3,
        60,
        60,
        0.0,
    )


@pytest.mark.slow
def test_a_run_that_fails_every_time_is_given_up_with_the_first_error(launch, tmp_path):
    run = tmp_path / "run"
    cluster = tmp_path / "cluster.yaml"
    # importing torch fails, but only in the ranks
    cluster.write_text(CLUSTER.replace("env: {", "env: {TORCH_LOGS: nonsense, "))
    process = launch(1, "--training.steps", "60")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    said = "2 attempts in a row made no new checkpoint; the last: rank 0 on "
    assert said in output
    assert "ValueError: " in output.partition(said)[2]
    assert [attempt.outcome for attempt in attempts.read_attempts(run)] == [
        Outcome.FAILED,
        Outcome.FAILED,
    ]
    title, lines = read_log_tail(run, None, None)
    assert title.startswith("attempt 2, rank 0, the first to fail, at ")
    assert any("ValueError" in line for line in lines)
    with pytest.raises(UserError, match="has no attempt 3"):
        read_log_tail(run, None, 3)
    with pytest.raises(UserError, match="rank-1.log is not there"):
        read_log_tail(run, 1, None)


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_its_own_exit_code_and_is_not_tried_again(launch, tmp_path):
    process = launch(
        1, "--optimizer.adamw_lr", "1e30", "--training.steps", "60", "--checkpoint.every_steps", "0"
    )
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 3
    assert [attempt.outcome for attempt in attempts.read_attempts(tmp_path / "run")] == [
        Outcome.DIVERGED
    ]
    assert "not finite in 20 steps in a row" in output
    assert "Traceback" not in output


def test_ctrl_c_saves_and_the_same_command_goes_on(launch, tmp_path):
    run, words = tmp_path / "run", ("--training.steps", "120", "--checkpoint.every_steps", "0")
    process = launch(1, *words)
    until(lambda: beat_of(run, 1, 0, 3), process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "SIGINT: saving; once more ends it at once" in output
    (only,) = attempts.read_attempts(run)
    assert only.outcome == Outcome.STOPPED
    assert only.reason == f"SIGINT, saved at step {only.reached}"
    assert launch(1, *words).communicate(timeout=300)[0].count("step 120/120") == 1
    assert attempts.read_attempts(run)[-1].checkpoint == only.reached


@pytest.mark.slow
def test_what_the_user_must_mend_is_not_tried_again(launch, tmp_path):
    process = launch(
        2,
        "--head.zero_stage",
        "3",
        "--optimizer.sharded",
        "false",
        "--checkpoint.fallback",
        "nonsense",
    )
    assert process.wait(300) == 2
    assert not (tmp_path / "run").exists()
    process = launch(1, "--model.bits", "8")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert "model.bits = 8 gives 256 codes, too few" in output
    assert len(attempts.read_attempts(tmp_path / "run")) == 1
