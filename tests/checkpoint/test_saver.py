import subprocess
from unittest import mock

import pytest
import torch

from bitlm_dist.checkpoint import saver as saver_module
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
    assert live.nbytes <= saver.bytes <= live.nbytes + 64, "one copy, however many saves"


def test_a_copy_that_finds_no_memory_fails_its_save_alone(tmp_path, monkeypatch):
    saver = Saver(tmp_path, ALONE)
    monkeypatch.setattr(torch, "empty", mock.Mock(side_effect=MemoryError("no memory")))
    saver.begin(1, of(torch.zeros(3)), {})
    with pytest.raises(store.SaveError, match="step-00000001 could not be written, .*: no memory"):
        saver.finish()
    monkeypatch.undo()
    saver.begin(2, of(torch.zeros(3)), {})
    assert saver.finish().step == 2


@pytest.mark.parametrize("code", [0, 2])
def test_memory_that_cannot_be_locked_is_used_as_it_is(code, tmp_path, monkeypatch, caplog):
    """On a GPU; here torch.cuda is made to answer. CUDA's last error is read, so that no later launch reports it."""
    cudart, read = mock.Mock(), mock.Mock(side_effect=RuntimeError("out of memory"))
    cudart.cudaHostRegister.return_value = code
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory = torch.zeros(256, dtype=torch.uint8)
    with mock.patch.object(torch, "zeros", read):
        saver_module._pin(memory)
    cudart.cudaHostRegister.assert_called_once_with(memory.data_ptr(), 256, 0)
    assert read.called == (code != 0)
    assert ("could not be locked (CUDA error 2): saves take longer" in caplog.text) == (code != 0)
    address = memory.data_ptr()
    del memory
    assert cudart.cudaHostUnregister.call_args_list == ([mock.call(address)] if code == 0 else [])


def test_one_save_at_a_time(tmp_path):
    saver = Saver(tmp_path, ALONE)
    saver.begin(1, of(torch.zeros(3)), {})
    with pytest.raises(AssertionError, match="finish the save before"):
        saver.begin(2, of(torch.zeros(3)), {})
    saver.finish()


def test_a_full_disk_leaves_the_checkpoint_before_and_no_rubbish(small_disk):
    root = small_disk / "checkpoints"
    root.mkdir()
    saver = Saver(root, ALONE)
    saver.begin(1, of(torch.ones(100)), {})
    saver.finish()
    large = Saver(root, ALONE)
    large.begin(2, of(torch.zeros(2**21)), {})
    with pytest.raises(
        store.SaveError, match=r"step-00000002 could not be written, [0-9]+ MiB are free there: .*No space left on device"
    ):
        large.finish()
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001"]
    assert torch.equal(saved(root, 1), torch.ones(100))
    saver.begin(3, of(torch.ones(100)), {})
    saver.finish()
    assert store.complete_steps(root) == [1, 3]


def test_a_disk_that_is_read_only_is_named(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(store.SaveError, match=r"step-00000002 could not be written, [0-9]+ MiB are free there: .*Read-only"):
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
