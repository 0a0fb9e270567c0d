"""`bitlm launch local` as a real command: killed and stopped ranks, runs that fail every time or
diverge, Ctrl-C.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from bitlm_dist.errors import UserError
from bitlm_dist.launch import attempts, local, submit
from bitlm_dist.launch.attempts import Outcome
from bitlm_dist.launch.history import history_of
from bitlm_dist.launch.logs import read_log_tail
from bitlm_dist.launch.status import status_of
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.distributed
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d ")
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
    assert first.reason == (
        f"rank 1 on {os.uname().nodename} was killed by signal 9 (SIGKILL); "
        "out of memory? see dmesg"
    )
    assert second.reason.startswith("rank 0 on ")
    assert "gave no sign of life for" in second.reason
    assert (third.checkpoint, third.reached) == (second.reached, 60)
    assert f"attempt 1 failed: {first.reason}; starting again" in output
    assert "attempt 2 hung: rank 0 on" in output
    assert "Traceback" not in output
    assert "step 60/60" in output, "what rank 0 prints is shown"
    assert all(TIME.match(line) for line in output.splitlines()), "this is no terminal"
    history = history_of(run)
    assert [attempt.last_step for attempt in history.attempts][-1] == 60
    assert history.steps_lost == sum(a.last_step - a.saved_step for a in history.attempts) > 0
    assert history.goodput is not None
    assert 0 < history.goodput < 1
    whole = Trainer.build(tiny(*words, "--run.dir", str(tmp_path / "whole"))).open()
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
    assert process.returncode == 75, output
    assert "SIGINT: saving; once more ends it at once" in output
    (only,) = attempts.read_attempts(run)
    assert only.outcome == Outcome.STOPPED
    assert only.reason == f"SIGINT, saved at step {only.reached}"
    assert output.rstrip().endswith(f"stopped: {only.reason}; the same command goes on")
    assert f"SIGINT: saved at step {only.reached}" in output, "rank 0 knows who has asked"
    assert "requeue" not in output
    assert launch(1, *words).communicate(timeout=300)[0].count("step 120/120") == 1
    assert attempts.read_attempts(run)[-1].checkpoint == only.reached


@pytest.mark.slow
def test_what_the_user_must_mend_is_not_tried_again(launch, tmp_path):
    process = launch(
        2,
        "--parallel.head.zero_stage",
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
    assert process.returncode == 2
    assert output.count("model.bits = 8 gives 256 codes, too few") == 1
    assert len(attempts.read_attempts(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_cancelled_run_is_resumed_with_its_ranks_and_environment(launch, tmp_path):
    run = tmp_path / "run"
    process = launch(2, "--training.steps", "60", "--checkpoint.every_steps", "0")
    until(lambda: beat_of(run, 1, 1, 3), process)
    assert submit.cancel_local_run(run) == 1
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 75, output
    resume = [sys.executable, "-m", "bitlm_dist", "launch", "resume", str(run)]
    again = subprocess.run(resume, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    first, second = attempts.read_attempts(run)
    assert first.reason == f"cancelled, saved at step {first.reached}"
    assert (second.outcome, second.checkpoint, second.reached) == (Outcome.DONE, first.reached, 60)
    assert f"attempt 2: 2 ranks from step {first.reached}" in again.stdout


@pytest.fixture
def run_here(launched, monkeypatch):
    """Function (*ranks) that runs the launcher without processes.

    Each attempt is a function of its folder and the launcher's list of stop requests; it does what
    the ranks would do, and returns their exit code. Returns exit code and shown lines.
    """

    def run(*ranks):
        settings = launched.folder / "launch" / "settings.json"
        record = {**json.loads(settings.read_text()), "max_restarts": 1, "pause": 0}
        settings.write_text(json.dumps(record))
        remaining = iter(ranks)

        class Ranks:
            def __init__(self, folder, num_ranks, env, echo):
                assert (num_ranks, env) == (2, {"A": "b"})
                self._folder = folder

            def wait(self, requests):
                return next(remaining)(self._folder, requests)

        monkeypatch.setattr(local, "RankProcesses", Ranks)
        shown = []
        code = local.run_local(launched.folder, 2, {"A": "b"}, shown.append)
        assert list(remaining) == []
        return code, shown

    return run


def report(outcome):
    def ranks(folder, requests):
        attempts.report_outcome({attempts.ATTEMPT_VARIABLE: str(folder)}, outcome, 5, "stop file")
        return 0

    return ranks


def fail(message, **how):
    def ranks(folder, requests):
        environment = {attempts.ATTEMPT_VARIABLE: str(folder)}
        report = {"lost_peer": False, "refused": False, **how}
        attempts.report_failure(environment, 0, message, **report)
        return 1

    return ranks


def interrupt(times):
    def ranks(folder, requests):
        requests.extend([signal.SIGINT] * times)
        attempts.request_stop(folder, "SIGINT")
        return 0 if times == 1 else 1

    return ranks


@pytest.mark.parametrize(
    ("ranks", "code", "last_line"),
    [
        ([report("done")], 0, "attempt 1: 2 ranks from the beginning; logs in "),
        ([report("stopped")], 75, "stopped: the file `stop` in the run folder, saved at step 5; "),
        ([interrupt(1)], 75, "stopped: SIGINT; the same command goes on"),
        ([interrupt(2)], 130, "ended at once: SIGINT; the same command goes on"),
        ([fail("no", refused=True)], 2, "attempt 1 was refused: no; details: "),
        ([fail("nan", diverged=True)], 3, "attempt 1 diverged: nan; details: "),
        ([fail("x")] * 2, 1, "given up: 2 attempts in a row made no new checkpoint; the last: "),
        ([fail("x"), report("done")], 0, "attempt 2: 2 ranks from the beginning; logs in "),
    ],
)
def test_every_end_has_its_exit_code_and_its_words(run_here, ranks, code, last_line):
    found, shown = run_here(*ranks)
    assert found == code
    assert shown[-1].startswith(f"bitlm: {last_line}")


@pytest.mark.parametrize("name", ["logs/rank-0.log", "start.log", "logs"])
def test_the_log_with_the_cause_is_named(run_here, name):
    def fail_with_log(folder, requests):
        if name != "logs":
            (folder / name).write_text("why\n")
        return fail("x", refused=True)(folder, requests)

    assert run_here(fail_with_log)[1][-1].endswith(f"/attempts/0001/{name}")


def test_a_run_that_is_cancelled_between_two_attempts_ends(run_here, launched):
    def cancel(folder, requests):
        (launched.folder / "launch" / attempts.CANCELLED_FILE).touch()
        return fail("x")(folder, requests)

    code, shown = run_here(cancel)
    assert code == 75
    assert "attempt 1 failed: rank 0 on " in shown[-1]
    assert "; cancelled; details: " in shown[-1]


@pytest.mark.parametrize(
    ("handler", "requested"), [(signal.SIG_DFL, [signal.SIGHUP]), (signal.SIG_IGN, [])]
)
def test_a_terminal_that_closes_stops_a_run_unless_nohup_started_it(run_here, handler, requested):
    seen = []

    def hang_up(folder, requests):
        os.kill(os.getpid(), signal.SIGHUP)
        seen.extend(requests)
        return report("done")(folder, requests)

    old = signal.signal(signal.SIGHUP, handler)
    try:
        run_here(hang_up)
    finally:
        signal.signal(signal.SIGHUP, old)
    assert seen == requested


def test_a_run_that_fails_while_it_is_to_stop_is_not_said_to_start_again(run_here):
    def fail_to_save(folder, requests):
        requests.append(signal.SIGINT)
        return fail("x")(folder, requests)

    _, shown = run_here(fail_to_save)
    assert "; not started again, as requested; details: " in shown[-1]


def test_a_run_that_is_cancelled_before_its_attempt_has_a_folder_is_stopped(
    run_here, launched, monkeypatch
):
    start_attempt = local.supervisor.start_attempt

    def start_after_cancel(run, nodes):
        (run / "launch" / attempts.CANCELLED_FILE).touch()
        return start_attempt(run, nodes)

    monkeypatch.setattr(local.supervisor, "start_attempt", start_after_cancel)
    stops = []
    code, _ = run_here(lambda folder, requests: stops.append((folder / "stop").read_text()) or 0)
    assert (code, stops) == (75, ["cancelled\n"])


def test_a_launcher_that_finds_no_room_waits_and_then_says_where_to_make_it(
    run_here, launched, monkeypatch
):
    errors = [OSError(errno.ENOSPC, "No space left on device", "/x/end.json")]
    decide = local.supervisor.decide

    def decide_when_there_is_room(folder, code):
        if errors:
            raise errors.pop()
        return decide(folder, code)

    monkeypatch.setattr(local.supervisor, "decide", decide_when_there_is_room)
    code, shown = run_here(report("done"))
    assert code == 0
    assert shown[1].startswith("bitlm: /x/end.json: no space left on device: make room on /")
    assert shown[1].endswith("; trying again in 0 s")
    errors.extend([OSError(errno.ENOSPC, "No space left on device", "/x/end.json")] * 2)
    with pytest.raises(UserError, match="make room on /.*; then the same command goes on"):
        run_here(report("done"))
