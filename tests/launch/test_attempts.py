import json
import os

from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import Limits, Outcome
from bitlm_dist.launch.heartbeat import Heartbeat


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


def test_a_lost_attempt_ended_with_its_last_sign_of_life(tmp_path):
    folder = attempts.create_attempt(tmp_path, "", 0, ["n0"], Limits())
    began = attempts.read_attempt(folder).began
    for name, seconds in (("beats/rank-0", 5.0), ("logs/rank-0.log", 7.0)):
        (folder / name).touch()
        os.utime(folder / name, (began, began + seconds))
    attempts.create_attempt(tmp_path, "", 0, ["n0"], Limits())
    lost = attempts.read_attempts(tmp_path)[0]
    assert (lost.outcome, round(lost.ended - began)) == (Outcome.LOST, 7)


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
