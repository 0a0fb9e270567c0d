import json
import subprocess

import pytest
import torch

from bitlm_dist.checkpoint import store
from bitlm_dist.errors import UserError


def tensors():
    return {"a": torch.arange(6.0).view(2, 3), "b.step": torch.tensor(7.0), "c": torch.ones(3, dtype=torch.bfloat16)}


def empty():
    return {name: torch.zeros_like(t) for name, t in tensors().items()}


@pytest.fixture
def saved(tmp_path):
    return store.save(tmp_path, 120, tensors(), {"tokens": 5}, keep=2)


def test_round_trip(saved):
    assert saved.name == "step-00000120"
    found = empty()
    state = store.read_state(saved)
    store.load(saved, found)
    assert (state["step"], state["tokens"]) == (120, 5)
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor)


def test_only_complete_folders_count_and_old_ones_go(tmp_path):
    for step in (1, 2, 3):
        store.save(tmp_path, step, tensors(), {}, keep=2)
    assert store.complete_steps(tmp_path) == [2, 3]
    (store.folder_of(tmp_path, 3) / "manifest.json").unlink()
    (tmp_path / ".step-00000009.partial").mkdir()
    assert store.complete_steps(tmp_path) == [2]


def test_a_save_over_a_half_written_folder_succeeds(tmp_path):
    (tmp_path / ".step-00000004.partial" / "tensors").mkdir(parents=True)
    (tmp_path / "step-00000004").mkdir()
    store.save(tmp_path, 4, tensors(), {}, keep=2)
    assert store.complete_steps(tmp_path) == [4]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one MiB."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before_and_no_rubbish(small_disk):
    store.save(small_disk, 1, tensors(), {}, keep=1)
    with pytest.raises(
        store.SaveError, match=r"step-00000002 could not be written, 1 MiB are free there: .*No space left on device"
    ):
        store.save(small_disk, 2, {"a": torch.zeros(2**20)}, {}, keep=1)
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    found = empty()
    store.read_state(store.folder_of(small_disk, 1))
    store.load(store.folder_of(small_disk, 1), found)
    assert torch.equal(found["a"], tensors()["a"])
    store.save(small_disk, 3, tensors(), {}, keep=1)
    assert store.complete_steps(small_disk) == [3]


def test_a_disk_that_is_read_only_is_named(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk.parent)], check=True)
    with pytest.raises(store.SaveError, match=r"step-00000002 could not be written, 1 MiB are free there: .*Read-only file system"):
        store.save(small_disk, 2, tensors(), {}, keep=1)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_every_damaged_file_is_named(saved, harm):
    for name in [*json.loads((saved / "manifest.json").read_text()), "manifest.json"]:
        if (name, harm) == ("manifest.json", "remove"):
            continue  # then it is no checkpoint at all
        file = saved / name
        good = file.read_bytes()
        if harm == "flip":
            file.write_bytes(good[:-1] + bytes([good[-1] ^ 128]))
        elif harm == "truncate":
            file.write_bytes(good[: len(good) // 2])
        else:
            file.unlink()
        with pytest.raises(UserError, match=f"{name} is (damaged|missing): remove"):
            store.read_state(saved)
        file.write_bytes(good)
    store.read_state(saved)


def test_a_checkpoint_of_another_model_is_refused(saved):
    with pytest.raises(UserError, match=r"a has shape \(2, 3\), the model has \(3, 3\): it is a checkpoint of another model"):
        store.load(saved, {**empty(), "a": torch.zeros(3, 3)})
    with pytest.raises(UserError, match="d is missing"):
        store.load(saved, {**empty(), "d": torch.zeros(1)})


def test_a_newer_format_is_refused(tmp_path):
    folder = store.save(tmp_path, 1, tensors(), {"format": 99}, keep=1)
    with pytest.raises(UserError, match="has format 99, this version reads up to 1: upgrade"):
        store.read_state(folder)
