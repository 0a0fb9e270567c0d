import os
import subprocess
import sys

from bitlm_dist.data import stale_resources
from bitlm_dist.data.stale_resources import is_stale, owner_tagged_name, remove_stale_resources

MAKE = """
import sys
from bitlm_dist.data.stale_resources import owner_tagged_name
print(owner_tagged_name('x'), flush=True)
sys.stdin.read()
"""


def test_what_a_live_process_owns_stays_and_what_a_dead_one_owned_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(stale_resources, "SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", MAKE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    theirs = child.stdout.readline().strip()
    mine = owner_tagged_name("x")
    for name in (theirs, mine):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
        (tmp_path / "shm" / name).write_text("")
    (tmp_path / "other").mkdir()

    assert remove_stale_resources(tmp_path) == []
    child.kill()
    child.wait()
    assert remove_stale_resources(tmp_path) == [tmp_path / theirs, tmp_path / "shm" / theirs]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine, "other", "shm"])


def test_a_process_number_in_use_again_is_another_owner():
    mine = owner_tagged_name("x")
    assert not is_stale(mine)
    started = mine.split("-")[-2]
    assert is_stale(mine.replace(f"-{started}-", f"-{int(started) - 1}-"))


def test_what_other_machines_and_namespaces_own_is_not_ours_to_judge():
    place = stale_resources._host_and_namespace()
    process = os.getpid()
    assert is_stale(f"bitlm-{place}-{process}-1-x")
    assert not is_stale(f"bitlm-other.{place.rpartition('.')[2]}-{process}-1-x")
    assert not is_stale(f"bitlm-{place}1-{process}-1-x")
    assert not is_stale("bitlm-notes")
    assert not is_stale("000000_locals")
