import json

import pytest
import torch

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint.steps import complete_steps, folder_of, read_health, read_train_state
from bitlm_dist.checkpoint.tensors import load_shards, local_entries
from bitlm_dist.errors import UserError
from bitlm_dist.parallel.sharded_tensor import ShardedTensor


def tensors():
    found = {
        "a": torch.arange(6.0).view(2, 3),
        "b.step": torch.tensor(7.0),
        "c": torch.ones(3, dtype=torch.bfloat16),
    }
    return {name: ShardedTensor.from_full(tensor) for name, tensor in found.items()}


def save(root, step, **state):
    entries = local_entries(tensors())
    return store.save(root, step, list(entries), entries.values(), state)


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path, 120, tokens=5)


def test_round_trip(saved, tmp_path):
    assert saved.name == "step-00000120"
    assert (tmp_path / "latest").resolve() == saved

    store.verify(saved)
    state = read_train_state(saved)
    assert (state["step"], state["tokens"]) == (120, 5)

    found = {
        name: ShardedTensor.from_full(torch.zeros_like(part.full))
        for name, part in tensors().items()
    }
    load_shards(saved, found)

    for name, part in tensors().items():
        assert torch.equal(found[name].full, part.full)


def test_only_complete_folders_count(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert complete_steps(tmp_path) == [1, 2, 3]

    (folder_of(tmp_path, 3) / "manifest.json").unlink()
    store.partial_folder_of(tmp_path, 9).mkdir()
    (store.partial_folder_of(tmp_path, 9) / "manifest.json").write_text("{}")
    folder_of(tmp_path, 2).rename(tmp_path / "damaged-step-00000002")
    assert complete_steps(tmp_path) == [1]


def test_a_save_removes_what_killed_ones_left(tmp_path):
    (tmp_path / ".step-00000003.partial").mkdir()
    (tmp_path / ".step-00000001.removed" / "x").mkdir(parents=True)
    (tmp_path / "step-00000004").mkdir()
    save(tmp_path, 4)
    assert complete_steps(tmp_path) == [4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000004"]


def test_a_removal_that_is_cut_short_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    folder = save(tmp_path, 1)
    monkeypatch.setattr(store.shutil, "rmtree", lambda *arguments: None)  # as if killed here
    store.remove(folder).join()
    assert complete_steps(tmp_path) == []
    assert len(list(tmp_path.glob(".*.removed"))) == 1

    monkeypatch.undo()
    save(tmp_path, 2)
    assert not list(tmp_path.glob(".*"))


def test_leftovers_that_cannot_go_do_not_stop_a_save(tmp_path):
    (tmp_path / ".step-00000003.removed").symlink_to("nowhere")
    (tmp_path / ".step-00000002.partial").write_text("a file")
    save(tmp_path, 4)
    assert complete_steps(tmp_path) == [4]


def test_a_name_in_the_way_of_latest_does_not_fail_a_save(tmp_path):
    (tmp_path / "latest" / "kept").mkdir(parents=True)
    save(tmp_path, 4)
    assert complete_steps(tmp_path) == [4]
    assert (tmp_path / "latest" / "kept").is_dir()


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_every_damaged_file_is_named(saved, harm):
    for name in [*store.read_manifest(saved), "manifest.json"]:
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
        with pytest.raises(store.DamagedError, match=f"{name} is (damaged|missing)"):
            store.verify(saved)
        file.write_bytes(good)

    store.verify(saved)


def test_a_file_that_cannot_be_read_is_damage(saved, monkeypatch):
    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "sha256_of", fail)
    with pytest.raises(store.DamagedError, match=r"\w+.* input/output error: check the disk$"):
        store.verify(saved)


def test_ranks_share_the_hashing(saved):
    file = saved / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found = 0
    for part in range(3):
        try:
            store.verify(saved, part, 3)
        except UserError:
            found += 1

    assert found == 1


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (
            {"format": 99, "files": []},
            "has format 99, this version reads format 2: upgrade bitlm-dist",
        ),
        (
            {"state.json": {"bytes": 1}},
            "has format 1, this version reads format 2: go on with the version that wrote it",
        ),
        ({"format": 2}, "manifest.json is damaged"),
        ({"format": 2, "files": {"state.json": {}}}, None),
        ([], "manifest.json is damaged"),
    ],
)
def test_other_formats_are_refused(saved, manifest, message):
    (saved / "manifest.json").write_text(json.dumps(manifest))
    for look in (store.verify, store.checkpoint_summary):
        with pytest.raises(UserError, match=message or "is damaged") as error:
            look(saved)
        assert isinstance(error.value, store.DamagedError) == (
            message is None or "damaged" in message
        )


def test_health_is_unknown_until_it_is_written(saved):
    assert read_health(saved) is None
    for healthy in (True, False):
        store.write_health(saved, healthy)
        assert read_health(saved) is healthy
    (saved / "health.json").write_text("{")
    assert read_health(saved) is None
    store.verify(saved)
