import json

import pytest

from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import STOPPED_BY_USER, Limits, Outcome
from bitlm_dist.launch.outcomes import first_clause, first_failure, outcome_of
from bitlm_dist.launch.rank_exit import report_exit


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = attempts.create_attempt(tmp_path, "", 0, ["here"], Limits())
    monkeypatch.setenv(attempts.ATTEMPT_VARIABLE, str(made))
    return made


def environment(folder):
    return {attempts.ATTEMPT_VARIABLE: str(folder)}


def test_files_decide_and_codes_only_where_there_are_none(folder):
    assert outcome_of(folder, 0)[0] == Outcome.FAILED, "no word is no success"
    (folder / "start.log").write_text(
        "python: command not found\nsrun: error: n1: task 1: Exited with exit code 127\n"
    )
    assert outcome_of(folder, 127) == (Outcome.FAILED, "python: command not found")
    (folder / "start.log").write_text(
        "srun: warning\nbitlm: the folder is not there on n1: choose another\n"
    )
    assert outcome_of(folder, 143) == (
        Outcome.REFUSED,
        "the folder is not there on n1: choose another",
    )
    attempts.request_stop(folder, "the time limit")
    assert outcome_of(folder, 143) == (Outcome.STOPPED, "the time limit")
    attempts.report_failure(environment(folder), 3, "ValueError: x", lost_peer=False, refused=False)
    outcome, reason = outcome_of(folder, 0)
    assert outcome == Outcome.FAILED
    assert reason.startswith("rank 3 on ")
    assert reason.endswith(": ValueError: x")
    (folder / "hung.json").write_text(
        json.dumps({"rank": 1, "host": "n7", "what": "gave no sign of life for 9 s"})
    )
    assert outcome_of(folder, 0) == (
        Outcome.HUNG,
        "rank 1 on n7 gave no sign of life for 9 s",
    )
    attempts.report_outcome(environment(folder), Outcome.STOPPED, 12, "SIGUSR2")
    assert outcome_of(folder, 1) == (Outcome.STOPPED, "the time limit, saved at step 12")
    attempts.report_outcome(environment(folder), Outcome.DONE, 20, "")
    assert outcome_of(folder, 1) == (Outcome.DONE, "step 20")


def test_a_run_that_diverged_is_told_from_one_that_failed(folder):
    assert outcome_of(folder, 3)[0] == Outcome.DIVERGED, (
        "the exit code counts where no file says more"
    )
    attempts.report_failure(
        environment(folder), 1, "gloo: closed by peer", lost_peer=True, refused=False
    )
    attempts.report_failure(
        environment(folder), 0, "no finite loss", lost_peer=False, refused=False, diverged=True
    )
    assert outcome_of(folder, 1) == (Outcome.DIVERGED, "no finite loss")
    record = folder / "failures" / "rank-0.json"  # as an older version writes it
    record.write_text(
        json.dumps(
            {
                key: value
                for key, value in json.loads(record.read_text()).items()
                if key != "diverged"
            }
        )
    )
    assert outcome_of(folder, 1)[0] == Outcome.FAILED


def test_a_stop_file_of_the_user_is_told_from_the_launcher_s(folder):
    attempts.report_outcome(environment(folder), Outcome.STOPPED, 4, "stop file")
    assert outcome_of(folder, 0)[1] == f"{STOPPED_BY_USER}, saved at step 4"
    attempts.report_outcome(environment(folder), Outcome.STOPPED, 4, "SIGTERM")
    assert outcome_of(folder, 0)[1] == "SIGTERM, saved at step 4"


def test_the_first_failure_is_no_rank_that_only_lost_a_peer(folder):
    attempts.report_failure(
        environment(folder), 0, "gloo: closed by peer", lost_peer=True, refused=False
    )
    attempts.report_failure(
        environment(folder), 5, "RuntimeError: nan", lost_peer=False, refused=False
    )
    attempts.report_failure(
        environment(folder), 4, "RuntimeError: later", lost_peer=False, refused=False
    )
    found = first_failure(folder)
    assert found is not None
    assert (found["rank"], found["message"]) == (5, "RuntimeError: nan")
    attempts.report_failure(
        environment(folder), 1, "data.path does not exist", lost_peer=False, refused=True
    )
    (folder / "failures" / "rank-5.json").unlink()
    (folder / "failures" / "rank-4.json").unlink()
    assert outcome_of(folder, 1) == (Outcome.REFUSED, "data.path does not exist")


KILLED = "was killed by signal 9 (SIGKILL); out of memory? see dmesg"


def lose_peer(folder, rank):
    message = "RuntimeError: gloo: Connection closed by peer"
    attempts.report_failure(environment(folder), rank, message, lost_peer=True, refused=False)


def test_a_killed_rank_comes_before_those_that_lost_it(folder):
    lose_peer(folder, 0)
    report_exit(folder, 1, -9, 0.0)
    outcome, reason = outcome_of(folder, -9)
    assert outcome == Outcome.FAILED
    assert reason.startswith("rank 1 on ")
    assert reason.endswith(f" {KILLED}")
    assert first_clause(reason).endswith("was killed by signal 9 (SIGKILL)")
    (folder / "start.log").write_text("bitlm: numa = 0 needs numactl on n1: install it\n")
    assert outcome_of(folder, -9) == (Outcome.REFUSED, "numa = 0 needs numactl on n1: install it")


@pytest.mark.parametrize("has_lost_peer", [True, False])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("Killed", KILLED),
        ("Out Of Memory", "was killed by Slurm: out of memory"),
        ("Exited with exit code 5", "ended with exit code 5 and reported nothing"),
    ],
)
def test_under_slurm_the_task_that_srun_saw_die_is_named(folder, how, words, has_lost_peer):
    if has_lost_peer:
        lose_peer(folder, 0)
    (folder / "start.log").write_text(
        f"srun: error: n1: task 1: {how}\nsrun: error: n0: task 0: Exited with exit code 1\n"
    )
    assert outcome_of(folder, 137) == (Outcome.FAILED, f"rank 1 on n1 {words}")
    attempts.request_stop(folder, "the time limit")
    assert words not in outcome_of(folder, 137)[1], "srun kills what does not stop in time"


def test_a_refusal_comes_before_the_tasks_that_srun_killed_for_it(folder):
    (folder / "start.log").write_text(
        "srun: error: n0: task 0: Killed\nbitlm: /run is not there on n1: choose another\n"
    )
    assert outcome_of(folder, 137) == (Outcome.REFUSED, "/run is not there on n1: choose another")


def test_a_task_of_torchrun_is_no_rank(folder):
    (folder.parents[1] / "settings.json").write_text(json.dumps({"launcher": "torchrun"}))
    (folder / "start.log").write_text("srun: error: n1: task 1: Killed\n")
    killed = f"the launcher of the ranks on n1 {KILLED}"
    assert outcome_of(folder, 137)[1] == killed
    lose_peer(folder, 1)  # a rank of the first node
    assert outcome_of(folder, 137)[1] == killed


def test_of_ranks_that_refuse_for_one_reason_the_first_one_is_shown(folder):
    for rank in (1, 0):
        attempts.report_failure(environment(folder), rank, "no", lost_peer=False, refused=True)
    found = first_failure(folder)
    assert found is not None
    assert found["rank"] == 0


@pytest.mark.parametrize(
    ("reason", "clause"),
    [
        ("rank 1 on n1: RuntimeError: x. A long hint", "rank 1 on n1: RuntimeError: x"),
        (
            "/x: no space left on device: make room on /disk, or elsewhere",
            "disk full: make room on /disk",
        ),
        ("x" * 300, "x" * 119 + "…"),
    ],
)
def test_the_first_clause_of_a_reason(reason, clause):
    assert first_clause(reason) == clause
