import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.data.shards import DocumentShards
from bitlm_dist.data.stale_resources import SHARED_MEMORY, owner_tagged_name
from bitlm_dist.errors import UserError

CPU = torch.device("cpu")


def feed_of(folder, **changes):
    settings = {"block_size": 4, "sequence_length": 32, "seed": 3, "shuffle": True, **changes}
    return PackedDataset(folder, "train", **settings)


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def shard_of(folder):
    return next((folder / "train").rglob("*.mds.zstd"))


def test_a_batch_is_a_function_of_its_position(prepared):
    a = feed_of(prepared)
    b = feed_of(prepared)
    total = len(a)

    # The first access of b, which has no history.
    late = b.batch(total + 3, 4, CPU)
    for first in range(0, total, 4):
        a.batch(first, 4, CPU)
    again = a.batch(total + 3, 4, CPU)
    assert torch.equal(late.tokens, again.tokens)

    assert late.sequence_index.tolist() == [total + 3 + i for i in range(4)]
    halves = [a.batch(total + 3, 2, CPU), a.batch(total + 5, 2, CPU)]
    assert torch.equal(torch.cat([h.tokens for h in halves]), late.tokens)
    a.close()
    b.close()


def test_each_epoch_holds_every_document_once_in_another_order(prepared):
    with DocumentShards(prepared, "train", seed=3) as shards:
        first = shards.epoch_order(0)
        second = shards.epoch_order(1)
        assert sorted(first) == sorted(second) == list(range(len(shards.document_lengths)))
        assert not np.array_equal(first, second)
        assert np.array_equal(first, shards.epoch_order(0))


def test_the_folder_is_never_altered(copy):
    before = {p: p.read_bytes() for p in sorted(copy.rglob("*")) if p.is_file()}
    feed = feed_of(copy)
    for first in range(0, len(feed), 8):
        feed.batch(first, 8, CPU)
    feed.close()
    assert before == {p: p.read_bytes() for p in sorted(copy.rglob("*")) if p.is_file()}


def test_the_temporary_cache_goes_with_the_feed(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    feed = feed_of(prepared)
    feed.batch(0, 1, CPU)
    assert list(tmp_path.glob(owner_tagged_name("shards-*")))
    feed.close()
    assert not list(tmp_path.glob(owner_tagged_name("shards-*")))


def test_no_lock_of_streaming_stays_behind(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    feed = feed_of(prepared)
    feed.batch(0, 1, CPU)
    feed.close()
    assert list(tmp_path.iterdir()) == []


def test_names_in_shared_memory_are_this_process_s_own_and_go_with_the_feed(prepared):
    def blocks():
        # Other processes have blocks of their own.
        return {
            path for path in SHARED_MEMORY.iterdir() if path.name.startswith(owner_tagged_name(""))
        }

    before = blocks()
    feed = feed_of(prepared)
    feed.batch(0, 1, CPU)
    assert blocks() - before
    feed.close()
    assert blocks() <= before


def test_a_missing_shard_is_named_before_training(copy):
    shard = shard_of(copy)
    shard.unlink()
    with pytest.raises(UserError, match=f"shard {shard} is missing"):
        feed_of(copy)


def test_a_truncated_shard_is_named_before_training(copy):
    shard = shard_of(copy)
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(UserError, match=f"shard {shard} has"):
        feed_of(copy)


def test_a_flipped_byte_is_named_when_it_is_read(copy):
    shard = shard_of(copy)
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    feed = feed_of(copy)
    with pytest.raises(UserError, match=f"shard {shard} is damaged"):
        for first in range(len(feed)):
            feed.batch(first, 1, CPU)
    feed.close()


def test_a_token_beyond_the_vocabulary_is_named_with_its_shard(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "vocabulary": 200}))
    with (
        DocumentShards(copy, "train") as shards,
        pytest.raises(UserError, match=f"shard {shard_of(copy)} has token 2.. in document 0, but"),
    ):
        shards.tokens(0)


def test_a_cache_that_is_full_is_no_damage(prepared, small_disk):
    cache = small_disk / "cache"
    shards = DocumentShards(prepared, "train", cache)
    (small_disk / "filler").write_bytes(bytes(4 * 2**20 - 40_000))
    with (
        shards,
        pytest.raises(UserError, match=f"does not fit on the disk of the cache {cache}: make room"),
    ):
        shards.tokens(0)


def test_folders_that_are_not_ready_are_explained(tmp_path, copy):
    with pytest.raises(UserError, match="does not exist: prepare it"):
        read_manifest(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no shards"):
        read_manifest(tmp_path / "empty")
    with pytest.raises(UserError, match=r"report.md is a file: name the folder that `bitlm prep`"):
        read_manifest(copy / "report.md")
    (copy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json is damaged: restore it"):
        read_manifest(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        read_manifest(copy)
    manifest = json.loads((copy / "settings.json").read_text())
    assert manifest["version"] == 2


@pytest.mark.parametrize(
    ("fraction", "remedy"),
    [
        (0.0, "prepare it with --validation, or read another split"),
        (
            0.05,
            r"no document fell into it \(--validation 0.05\): prepare more documents, or a larg",
        ),
    ],
)
def test_a_missing_split_is_explained_by_the_settings_of_the_preparation(copy, fraction, remedy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["validation"]["documents"] = 0
    manifest["settings"]["validation"] = fraction
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"copy has no validation split: {remedy}"):
        DocumentShards(copy, "validation")


def test_a_summary_counts_and_warns_of_steps_that_read_everything(prepared):
    dataset = feed_of(prepared, sequence_length=2**16)
    assert len(dataset) == 1
    assert dataset.summary().startswith("1 sequence per epoch: 65,536 positions, of which ")
    shares = dataset.summary().partition("greedy: ")[2]
    assert re.fullmatch(r"\d\d % padding, 0 % repeated, 0 % of the documents cut", shares)

    (warning,) = dataset.warnings(8)
    assert warning.startswith("an epoch has 1 sequence and a step takes 8, so every step reads all")
    assert dataset.warnings(1)
    assert not dataset.warnings(0)
    dataset.close()


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("shuffle_algo", "naive", "shuffle_algorithm"),
        ("shuffle_block_size", 7, "shuffle_block_size"),
        ("shuffle_seed", 9, "order"),
    ],
)
def test_a_shuffle_that_goes_otherwise_has_another_fingerprint(prepared, name, value, field):
    """Whatever the reason is: settings, seed, or another version of the library."""
    with DocumentShards(prepared, "train") as shards:
        before = shards.order_fingerprint()
        setattr(shards._dataset, name, value)
        after = shards.order_fingerprint()
    assert before[field] != after[field]
