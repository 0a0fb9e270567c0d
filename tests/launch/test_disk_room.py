import pytest

from bitlm_dist import disks
from bitlm_dist.launch import disk_room
from bitlm_dist.launch.disk_room import full_disk, with_disk_hint


def test_a_full_disk_is_named(tmp_path):
    full = f"{tmp_path}/x: no space left on device"
    reason = f"{full}: make room on that disk, or choose a folder on another"
    found = with_disk_hint(tmp_path, reason)
    disk = full_disk(found)
    assert disk is not None
    assert tmp_path.is_relative_to(disk)
    assert found == reason.replace("that disk", disk)
    assert full_disk(with_disk_hint(tmp_path, "OSError: No space left on device")) == disk


@pytest.mark.parametrize(
    "reason",
    [
        "rank 0 on n0: /dev/shm/cache/0.mds: no space left on device: make room on that disk",
        "rank 0 on n0: OSError: [Errno 28] No space left on device: '/dev/shm/cache/0.mds'",
        "/dev/shm/x: disk quota exceeded: make room: your quota is used up",
    ],
)
def test_the_disk_is_that_of_the_path_in_the_reason(reason, tmp_path):
    assert full_disk(with_disk_hint(tmp_path, reason)) == "/dev/shm"


def test_a_rank_without_words_is_explained_by_the_disk(tmp_path, monkeypatch):
    assert with_disk_hint(tmp_path, "rank 0 on n0: why") == "rank 0 on n0: why"
    assert full_disk("rank 0 on n0: why") is None
    monkeypatch.setattr(disk_room, "free_bytes", lambda path: disks.MIN_FREE_BYTES - 1)
    assert with_disk_hint(tmp_path, "why").startswith("why; make room on /")
