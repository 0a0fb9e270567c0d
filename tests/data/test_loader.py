import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch

from bitlm_dist.data.feed import Feed
from bitlm_dist.data.leftovers import PREFIX, SHARED_MEMORY
from bitlm_dist.data.loader import Loader
from bitlm_dist.data.mixed_feed import training_feed
from bitlm_dist.errors import UserError

CPU = torch.device("cpu")


def loader_of(config, feed, begun=0, rank=0, ranks=1):
    stride = config.training.global_batch_tokens // config.data.sequence_length
    share = stride // ranks
    first = begun * stride + rank * share
    return Loader(config, feed, begun=begun, first=first, count=share, stride=stride, device=CPU)


def take(loader, step):
    loader.ask(step)
    loader.wait()
    return loader.take()


def children():
    return {p.pid for p in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(p.cmdline())}


@pytest.fixture
def clean():
    """Nothing that the test starts or opens outlives it."""
    before = children(), set(SHARED_MEMORY.glob(f"{PREFIX}*"))
    yield
    assert children() <= before[0]
    assert set(SHARED_MEMORY.glob(f"{PREFIX}*")) <= before[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_feed_from_any_step_on(workers, tiny, clean):
    config = tiny("--data.workers", str(workers))
    feed = Feed.of_config(config, "train", shuffle=True)
    for begun in (0, 5):
        loader = loader_of(config, feed, begun)
        for step in range(begun, begun + 4):
            found, expected = take(loader, step), feed.batch(8 * step, 8, CPU)
            assert torch.equal(found.tokens, expected.tokens)
            assert torch.equal(found.document_ids, expected.document_ids)
            assert torch.equal(found.sample, expected.sample)
        assert loader.close()
    feed.close()


def test_a_changing_number_of_ranks_reads_what_one_rank_reads(tiny, clean):
    """Mid-epoch 4, 2, 8 and 4 ranks: each step's global batch, put together from the ranks' shares, is that of one rank."""
    config, found, expected = tiny(), [], []
    whole = Feed.of_config(config, "train", shuffle=True)
    for begun, ranks in ((0, 4), (3, 2), (6, 8), (9, 4)):
        feeds = [Feed.of_config(config, "train", shuffle=True) for _ in range(ranks)]
        loaders = [loader_of(config, feed, begun, rank, ranks) for rank, feed in enumerate(feeds)]
        for step in range(begun, begun + 3):
            found.append(torch.cat([take(loader, step).tokens for loader in loaders]))
            expected.append(whole.batch(8 * step, 8, CPU).tokens)
        for loader, feed in zip(loaders, feeds, strict=True):
            loader.close()
            feed.close()
    assert len(whole) > 12 * 8, "all inside an epoch"
    whole.close()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def flip(folder: Path, shard: Path):
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)


def truncate(folder: Path, shard: Path):
    shard.write_bytes(shard.read_bytes()[:-7])


def remove(folder: Path, shard: Path):
    shard.unlink()


def empty(folder: Path, shard: Path):
    shard.write_bytes(b"")


def other_hash(folder: Path, shard: Path):
    index = folder / "train" / "index.json"
    document = json.loads(index.read_text())
    document["shards"][0]["zip_data"]["hashes"]["xxh64"] = "0" * 16
    index.write_text(json.dumps(document))


DAMAGE = [
    (flip, "is damaged"),
    (truncate, "bytes, expected"),
    (remove, "is missing"),
    (empty, "has 0 bytes"),
    (other_hash, "is damaged"),
]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("harm", "message"), DAMAGE, ids=lambda x: getattr(x, "__name__", ""))
def test_damage_names_the_shard_and_leaves_nothing_behind(workers, harm, message, tiny, prepared, tmp_path, clean):
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    shard = next((copy / "train").rglob("*.mds.zstd"))
    harm(copy, shard)
    config = tiny("--data.path", str(copy), "--data.workers", str(workers))
    with pytest.raises(UserError, match=f"shard {shard} .*{message}|shard {shard} {message}"):
        feed = training_feed(config)
        loader = loader_of(config, feed)
        try:
            for step in range(40):
                take(loader, step)
        finally:
            loader.close()
            feed.close()


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 2}', '{"shards": [{"samples": 1}]}'])
def test_an_index_that_is_none_is_named(content, tiny, prepared, tmp_path, clean):
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    (copy / "train" / "index.json").write_text(content)
    with pytest.raises(UserError, match="train/index.json is damaged"):
        training_feed(tiny("--data.path", str(copy)))
