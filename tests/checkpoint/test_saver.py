import subprocess

import pytest
import torch

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.checkpoint.saver import Saver
from bitlm_dist.checkpoint.tensors import read_index, read_whole
from bitlm_dist.parallel.layout import ALONE
from bitlm_dist.parallel.sliced import Sliced


def of(tensor):
    return {"a": Sliced.whole(tensor)}


def saved(root, step):
    folder = store.folder_of(root, step)
    store.verify(folder)
    return read_whole(folder, "a", read_index(folder))


def test_what_is_saved_is_what_was_there_when_the_save_began(tmp_path):
    saver, live = Saver(tmp_path, ALONE), torch.arange(1000.0)
    for step in (1, 2):
        before = live.clone()
        saver.begin(step, of(live), {"tokens": step})
        live.mul_(2)
        assert saver.pending
        assert store.complete_steps(tmp_path) == list(range(1, step)), "complete when all ranks say so"
        done = saver.finish()
        assert not saver.pending
        assert torch.equal(saved(tmp_path, step), before)
        assert (done.step, done.bytes > 4000) == (step, True)
        assert 0 < done.stall_seconds <= done.total_seconds
    assert saver.bytes == live.nbytes, "one copy, however many saves"


def test_one_save_at_a_time(tmp_path):
    saver = Saver(tmp_path, ALONE)
    saver.begin(1, of(torch.zeros(3)), {})
    with pytest.raises(AssertionError, match="finish the save before"):
        saver.begin(2, of(torch.zeros(3)), {})
    saver.finish()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one MiB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before_and_no_rubbish(small_disk):
    saver = Saver(small_disk, ALONE)
    saver.begin(1, of(torch.ones(100)), {})
    saver.finish()
    large = Saver(small_disk, ALONE)
    large.begin(2, of(torch.zeros(2**20)), {})
    with pytest.raises(
        store.SaveError, match=r"step-00000002 could not be written, 1 MiB are free there: .*No space left on device"
    ):
        large.finish()
    assert sorted(path.name for path in small_disk.iterdir()) == ["latest", "step-00000001"]
    assert torch.equal(saved(small_disk, 1), torch.ones(100))
    saver.begin(3, of(torch.ones(100)), {})
    saver.finish()
    assert store.complete_steps(small_disk) == [1, 3]


def test_a_disk_that_is_read_only_is_named(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk.parent)], check=True)
    with pytest.raises(store.SaveError, match=r"step-00000002 could not be written, 1 MiB are free there: .*Read-only file system"):
        Saver(small_disk, ALONE).begin(2, of(torch.zeros(3)), {})


def test_training_can_go_on_after_a_save_that_failed_while_writing(tmp_path, monkeypatch):
    saver, plain = Saver(tmp_path, ALONE), tensor_files.write

    def fail(*arguments):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(tensor_files, "write", fail)
    saver.begin(1, of(torch.zeros(3)), {})
    with pytest.raises(store.SaveError, match="step-00000001 could not be written, .*: disk on fire"):
        saver.finish()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tensor_files, "write", plain)
    saver.begin(2, of(torch.zeros(3)), {})
    assert saver.finish().step == 2
