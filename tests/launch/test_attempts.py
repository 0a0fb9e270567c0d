import json
from dataclasses import replace

import pytest

from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import STOPPED_BY_USER, Attempt, Limits, Outcome, next_action
from bitlm_dist.launch.heartbeat import Heartbeat


def attempt(outcome, begun=0, reached=0, reason="why"):
    return Attempt(1, "7", 0, ("n0",), 0.0, begun, outcome, reason, reached)


@pytest.mark.parametrize(
    ("last", "cancelled", "action"),
    [
        (attempt(Outcome.DONE), False, "end"),
        (attempt(Outcome.DONE), True, "end"),
        (attempt(Outcome.STOPPED, 0, 5), False, "requeue"),
        (attempt(Outcome.STOPPED, 0, 5), True, "end"),
        (attempt(Outcome.STOPPED, 0, 5, STOPPED_BY_USER + ", saved at step 5"), False, "end"),
        (attempt(Outcome.REFUSED), False, "give up"),
        (attempt(Outcome.DIVERGED, 0, 5), False, "give up"),
        (attempt(Outcome.DIVERGED, 0, 5), True, "end"),
        (attempt(Outcome.FAILED, 0, 5), False, "restart"),
        (attempt(Outcome.FAILED, 0, 5), True, "end"),
        (attempt(Outcome.HUNG), False, "restart"),
        (attempt(Outcome.LOST), False, "restart"),
        (attempt(Outcome.BAD_NODES), False, "resubmit"),
    ],
)
def test_what_comes_after_an_attempt(last, cancelled, action):
    decision = next_action([last], 2, cancelled, ["n3"])
    assert decision.action == action
    assert decision.exclude == (("n3",) if action == "resubmit" else ())


@pytest.mark.parametrize("outcome", [Outcome.STOPPED, Outcome.FAILED, Outcome.HUNG, Outcome.LOST])
def test_no_run_goes_round_in_circles(outcome):
    idle = attempt(outcome, 5, 5)
    assert next_action([idle] * 2, 2, False).action != "give up"
    decision = next_action([idle] * 3, 2, False)
    assert decision.action == "give up"
    assert decision.reason == "3 attempts in a row made no new checkpoint; the last: why"
    after = attempt(outcome, 6, 6)
    assert (
        next_action([idle, idle, attempt(outcome, 5, 6), after, after], 2, False).action
        != "give up"
    ), "a checkpoint resets the count"
    back = [
        attempt(outcome, 3, 6),
        attempt(outcome, 6, 3),
        attempt(outcome, 3, 6),
        attempt(outcome, 6, 3),
    ]
    assert next_action(back, 2, False).action == "give up", (
        "getting where it was before is no progress"
    )
    assert next_action([idle], 0, False).action == "give up"
    mended = replace(idle, submission="later")
    assert next_action([idle] * 9 + [mended], 2, False).action != "give up", (
        "what the user does begins anew"
    )


def test_bad_nodes_are_no_restarts():
    assert (
        next_action([attempt(Outcome.BAD_NODES, 5, 5)] * 9, 2, False, ["n3"]).action == "resubmit"
    )


def test_what_must_be_mended_ends_only_what_never_worked():
    assert (
        next_action(
            [attempt(Outcome.FAILED, 0, 5), attempt(Outcome.REFUSED, 5, 5)], 2, False
        ).action
        == "restart"
    )


def test_an_attempt_without_an_end_is_given_one(tmp_path):
    first = attempts.create_attempt(tmp_path, "7", 0, ["n0", "n1"], Limits(heartbeat_interval=3.0))
    assert attempts.read_attempts(tmp_path)[0].outcome == ""
    (tmp_path / "checkpoints" / "step-00000012").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000012" / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / ".step-00000013.partial").mkdir()
    second = attempts.create_attempt(tmp_path, "7", 1, ["n0", "n1"], Limits())
    assert (first.name, second.name) == ("0001", "0002")
    old, new = attempts.read_attempts(tmp_path)
    assert (old.outcome, old.checkpoint, old.reached) == (Outcome.LOST, -1, 12)
    assert old.limits == Limits(heartbeat_interval=3.0)
    assert (new.restart, new.checkpoint, new.nodes) == (1, 12, ("n0", "n1"))


def test_an_attempt_of_an_earlier_version_is_read(tmp_path):
    folder = attempts.create_attempt(tmp_path, "7", 0, ["n0"], Limits(), "first")
    file = folder / "attempt.json"
    old = {"beat": 1.0, "frozen": 4.0, "stalled": 50.0, "start": 60.0}
    file.write_text(json.dumps({**json.loads(file.read_text()), "limits": old}))
    expected = Limits(
        heartbeat_interval=1.0, heartbeat_timeout=4.0, step_timeout=50.0, startup_timeout=60.0
    )
    assert attempts.read_attempt(folder).limits == expected
    environment = {attempts.ATTEMPT_VARIABLE: str(folder)}
    assert Heartbeat.from_environment(environment, 0, 1)._limits == expected


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = attempts.create_attempt(tmp_path, "", 0, ["here"], Limits())
    monkeypatch.setenv(attempts.ATTEMPT_VARIABLE, str(made))
    return made


def environment(folder):
    return {attempts.ATTEMPT_VARIABLE: str(folder)}


def test_files_decide_and_codes_only_where_there_are_none(folder):
    assert attempts.outcome_of(folder, 0)[0] == Outcome.FAILED, "no word is no success"
    (folder / "start.log").write_text(
        "python: command not found\nsrun: error: n1: task 1: Exited with exit code 127\n"
    )
    assert attempts.outcome_of(folder, 127) == (Outcome.FAILED, "python: command not found")
    (folder / "start.log").write_text(
        "srun: warning\nbitlm: the folder is not there on n1: choose another\n"
    )
    assert attempts.outcome_of(folder, 143) == (
        Outcome.REFUSED,
        "the folder is not there on n1: choose another",
    )
    attempts.request_stop(folder, "the time limit")
    assert attempts.outcome_of(folder, 143) == (Outcome.STOPPED, "the time limit")
    attempts.report_failure(environment(folder), 3, "ValueError: x", lost_peer=False, refused=False)
    outcome, reason = attempts.outcome_of(folder, 0)
    assert outcome == Outcome.FAILED
    assert reason.startswith("rank 3 on ")
    assert reason.endswith(": ValueError: x")
    (folder / "hung.json").write_text(
        json.dumps({"rank": 1, "host": "n7", "what": "gave no sign of life for 9 s"})
    )
    assert attempts.outcome_of(folder, 0) == (
        Outcome.HUNG,
        "rank 1 on n7 gave no sign of life for 9 s",
    )
    attempts.report_outcome(environment(folder), Outcome.STOPPED, 12, "SIGUSR2")
    assert attempts.outcome_of(folder, 1) == (Outcome.STOPPED, "the time limit, saved at step 12")
    attempts.report_outcome(environment(folder), Outcome.DONE, 20, "")
    assert attempts.outcome_of(folder, 1) == (Outcome.DONE, "step 20")


def test_a_run_that_diverged_is_told_from_one_that_failed(folder):
    assert attempts.outcome_of(folder, 3)[0] == Outcome.DIVERGED, (
        "the exit code counts where no file says more"
    )
    attempts.report_failure(
        environment(folder), 1, "gloo: closed by peer", lost_peer=True, refused=False
    )
    attempts.report_failure(
        environment(folder), 0, "no finite loss", lost_peer=False, refused=False, diverged=True
    )
    assert attempts.outcome_of(folder, 1) == (Outcome.DIVERGED, "no finite loss")
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
    assert attempts.outcome_of(folder, 1)[0] == Outcome.FAILED


def test_a_stop_file_of_the_user_is_told_from_the_launcher_s(folder):
    attempts.report_outcome(environment(folder), Outcome.STOPPED, 4, "stop file")
    assert attempts.outcome_of(folder, 0)[1] == f"{STOPPED_BY_USER}, saved at step 4"
    attempts.report_outcome(environment(folder), Outcome.STOPPED, 4, "SIGTERM")
    assert attempts.outcome_of(folder, 0)[1] == "SIGTERM, saved at step 4"


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
    found = attempts.first_failure(folder)
    assert found is not None
    assert (found["rank"], found["message"]) == (5, "RuntimeError: nan")
    attempts.report_failure(
        environment(folder), 1, "data.path does not exist", lost_peer=False, refused=True
    )
    (folder / "failures" / "rank-5.json").unlink()
    (folder / "failures" / "rank-4.json").unlink()
    assert attempts.outcome_of(folder, 1) == (Outcome.REFUSED, "data.path does not exist")


def test_without_a_launcher_nothing_is_written(tmp_path):
    attempts.report_outcome({}, Outcome.DONE, 3, "")
    attempts.report_failure({}, 0, "x", lost_peer=False, refused=False)
    assert attempts.stop_files({}) == []
    assert list(tmp_path.iterdir()) == []


def test_a_cancelled_run(tmp_path):
    assert not attempts.is_cancelled(tmp_path)
    attempts.create_attempt(tmp_path, "", 0, ["here"], Limits())
    (tmp_path / "launch" / attempts.CANCELLED_FILE).touch()
    assert attempts.is_cancelled(tmp_path)
