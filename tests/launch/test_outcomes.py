import json

import pytest

from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import STOPPED_BY_USER, Limits, Outcome
from bitlm_dist.launch.outcomes import first_failure, outcome_of


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
