import subprocess
from unittest import mock

import pytest
import torch

from bitlm_dist.checkpoint import saver as saver_module
from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.checkpoint.saver import Saver
from bitlm_dist.checkpoint.steps import complete_steps, folder_of
from bitlm_dist.checkpoint.tensors import load_full, read_index
from bitlm_dist.parallel.layout import SINGLE_PROCESS
from bitlm_dist.parallel.sharded_tensor import ShardedTensor


def of(tensor):
    return {"a": ShardedTensor.from_full(tensor)}


def saved(root, step):
    folder = folder_of(root, step)
    store.verify(folder)
    return load_full(folder, "a", read_index(folder))


def test_what_is_saved_is_what_was_there_when_the_save_began(tmp_path):
    saver = Saver(tmp_path, SINGLE_PROCESS)
    live = torch.arange(1000.0)
    for step in (1, 2):
        before = live.clone()
        saver.start_save(step, of(live), {"tokens": step})
        live.mul_(2)
        assert saver.has_pending_save
        assert complete_steps(tmp_path) == list(range(1, step)), "complete when all ranks say so"
        done = saver.finish_save()
        assert not saver.has_pending_save
        assert torch.equal(saved(tmp_path, step), before)
        assert (done.step, done.bytes > 4000) == (step, True)
        assert 0 < done.stall_seconds <= done.total_seconds

    assert live.nbytes <= saver.host_buffer_bytes <= live.nbytes + 64, (
        "one copy, however many saves"
    )


def test_a_copy_that_finds_no_memory_fails_its_save_alone(tmp_path, monkeypatch):
    saver = Saver(tmp_path, SINGLE_PROCESS)
    monkeypatch.setattr(torch, "empty", mock.Mock(side_effect=MemoryError("no memory")))
    saver.start_save(1, of(torch.zeros(3)), {})
    with pytest.raises(store.SaveError, match="step-00000001 could not be written, .*: no memory"):
        saver.finish_save()

    monkeypatch.undo()
    saver.start_save(2, of(torch.zeros(3)), {})
    assert saver.finish_save().step == 2


@pytest.mark.parametrize("code", [0, 2])
def test_memory_that_cannot_be_locked_is_used_as_it_is(code, tmp_path, monkeypatch, caplog):
    """On a GPU, which a fake torch.cuda stands for here.

    CUDA's last error is read, so that no later launch reports it.
    """
    cudart = mock.Mock()
    read = mock.Mock(side_effect=RuntimeError("out of memory"))
    cudart.cudaHostRegister.return_value = code
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory = torch.zeros(256, dtype=torch.uint8)

    with mock.patch.object(torch, "zeros", read):
        saver_module._pin_memory(memory)

    cudart.cudaHostRegister.assert_called_once_with(memory.data_ptr(), 256, 0)
    assert read.called == (code != 0)
    assert ("could not be locked (CUDA error 2): saves take longer" in caplog.text) == (code != 0)

    address = memory.data_ptr()
    del memory
    assert cudart.cudaHostUnregister.call_args_list == ([mock.call(address)] if code == 0 else [])


def test_one_save_at_a_time(tmp_path):
    saver = Saver(tmp_path, SINGLE_PROCESS)
    saver.start_save(1, of(torch.zeros(3)), {})
    with pytest.raises(AssertionError, match="finish the save before"):
        saver.start_save(2, of(torch.zeros(3)), {})
    saver.finish_save()


def test_a_full_disk_leaves_the_checkpoint_before_and_no_rubbish(small_disk):
    root = small_disk / "checkpoints"
    root.mkdir()
    saver = Saver(root, SINGLE_PROCESS)
    saver.start_save(1, of(torch.ones(100)), {})
    saver.finish_save()
    large = Saver(root, SINGLE_PROCESS)
    large.start_save(2, of(torch.zeros(2**21)), {})

    message = "[0-9]+ MiB are free there: no space left on device"
    with pytest.raises(store.SaveError, match=f"step-00000002 could not be written, {message}"):
        large.finish_save()

    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000001"]
    assert torch.equal(saved(root, 1), torch.ones(100))

    saver.start_save(3, of(torch.ones(100)), {})
    saver.finish_save()
    assert complete_steps(root) == [1, 3]


def test_a_disk_that_is_read_only_is_named(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(
        store.SaveError,
        match=r"step-00000002 could not be written, [0-9]+ MiB are free there: .*read-only",
    ):
        Saver(small_disk, SINGLE_PROCESS).start_save(2, of(torch.zeros(3)), {})


def test_training_can_go_on_after_a_save_that_failed_while_writing(tmp_path, monkeypatch):
    saver = Saver(tmp_path, SINGLE_PROCESS)
    plain = tensor_files.write_safetensors

    def fail(*arguments):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(tensor_files, "write_safetensors", fail)
    saver.start_save(1, of(torch.zeros(3)), {})
    with pytest.raises(
        store.SaveError, match="step-00000001 could not be written, .*: disk on fire"
    ):
        saver.finish_save()

    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(tensor_files, "write_safetensors", plain)
    saver.start_save(2, of(torch.zeros(3)), {})
    assert saver.finish_save().step == 2
