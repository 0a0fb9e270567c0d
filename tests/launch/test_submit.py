import json

import pytest

from bitlm_dist.errors import UserError
from bitlm_dist.files import try_lock
from bitlm_dist.launch import attempts, submit, supervisor
from bitlm_dist.launch.attempts import CANCELLED_FILE, LAUNCH, Outcome
from bitlm_dist.launch.cluster import Cluster
from bitlm_dist.launch.liveness import LAUNCHER_LOCK
from bitlm_dist.launch.render import Job


@pytest.fixture
def lock(launched):
    """The lock that a running launcher holds."""
    with (launched.folder / LAUNCH / LAUNCHER_LOCK).open("w") as stream:
        assert try_lock(stream)
        yield stream


def test_a_local_run_is_stopped_through_its_attempt(launched, lock):
    folder = launched.start()
    assert submit.cancel_local_run(launched.folder) == 1
    assert (folder / "stop").read_text() == "cancelled\n"
    launched.end(Outcome.FAILED, "why")
    assert submit.cancel_local_run(launched.folder) == 0, "between two attempts"
    assert attempts.is_cancelled(launched.folder)


def test_a_run_that_trains_is_not_started_again(launched, lock):
    job = Job(launched.folder, (), 1, Cluster())
    with pytest.raises(UserError, match="is being trained by another `bitlm launch local`"):
        submit.check_can_start(job)
    lock.close()
    submit.check_can_start(job)


def test_where_nothing_runs_nothing_is_cancelled(launched):
    folder = launched.start()
    assert submit.cancel_local_run(launched.folder) is None
    assert not (folder / "stop").exists()
    assert not (launched.folder / LAUNCH / CANCELLED_FILE).exists()


def test_a_run_on_another_machine_is_known_by_its_heartbeats(launched):
    folder = launched.start()
    file = folder / "attempt.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "nodes": ["elsewhere"]}))
    assert submit.cancel_local_run(launched.folder) == 1


def test_a_local_run_is_resumed_with_its_ranks_and_a_new_count_of_restarts(launched):
    before = supervisor.load_settings(launched.folder)
    assert submit.resume_local_run(launched.folder) == submit.LocalJob(2, {"A": "b"})
    after = supervisor.load_settings(launched.folder)
    assert after.pop("submission") > before.pop("submission")
    assert after == before


def test_a_local_run_that_cannot_be_resumed_names_the_command(launched, lock):
    with pytest.raises(UserError, match="is being submitted or trained by another `bitlm launch`"):
        submit.resume_local_run(launched.folder)
    lock.close()
    moved = launched.folder.rename(launched.folder.with_name("moved"))
    with pytest.raises(UserError, match=f"use `bitlm launch local {moved}/config.yaml`"):
        submit.resume_local_run(moved)

    launched.folder = moved.rename(launched.folder)
    file = launched.folder / LAUNCH / supervisor.SETTINGS
    file.write_text(json.dumps({**supervisor.load_settings(launched.folder), "local": None}))
    folder = launched.start()
    for rank in range(4):
        (folder / "logs" / f"rank-{rank}.log").touch()
    command = f"use `bitlm launch local {launched.folder}/launch/config.yaml -n 4`"
    assert submit.is_local(launched.folder)
    with pytest.raises(UserError, match=command):
        submit.resume_local_run(launched.folder)
