import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
import zstandard

from bitlm_dist.config_loading import to_yaml
from bitlm_dist.data.loader import Loader
from bitlm_dist.data.mixture_dataset import training_dataset
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.data.stale_resources import (
    OWNER_PREFIX,
    SHARED_MEMORY,
    is_stale,
    owner_tagged_name,
    remove_stale_resources,
)
from bitlm_dist.errors import UserError
from bitlm_dist.model.batch import TargetFinder

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
EOS = 1


def finder_of(config, share):
    return TargetFinder(config.model.block_size, EOS, True, None, share)


def loader_of(config, feed, begun=0, rank=0, ranks=1):
    stride = config.training.global_batch_tokens // config.data.sequence_length
    share = stride // ranks
    first = begun * stride + rank * share
    return Loader(
        config,
        feed,
        finder_of(config, share),
        start_step=begun,
        first_sequence=first,
        num_sequences=share,
        stride=stride,
        device=CPU,
    )


def take(loader, step):
    loader.start(step)
    loader.wait()
    return loader.get()


def children():
    return {
        p.pid
        for p in psutil.Process().children(recursive=True)
        if "resource_tracker" not in " ".join(p.cmdline())
    }


def memory():
    """List the shared memory of this process and of dead ones, not that of other jobs."""
    return {
        path
        for path in SHARED_MEMORY.iterdir()
        if path.name.startswith(owner_tagged_name("")) or is_stale(path.name)
    }


@pytest.fixture
def clean():
    """Check that no process and no shared memory outlives the test."""
    before = children(), memory()
    yield
    assert children() <= before[0]
    assert memory() <= before[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_feed_from_any_step_on(workers, tiny, clean):
    config = tiny("--data.workers", str(workers))
    feed = PackedDataset.from_config(config, "train", shuffle=True)
    for begun in (0, 5):
        loader = loader_of(config, feed, begun)
        for step in range(begun, begun + 4):
            found = take(loader, step)
            expected = feed.batch(8 * step, 8, CPU)
            assert torch.equal(found.tokens, expected.tokens)
            assert torch.equal(found.document_ids, expected.document_ids)
            assert torch.equal(found.sequence_index, expected.sequence_index)
        assert loader.close()
    feed.close()


def test_a_changing_number_of_ranks_reads_what_one_rank_reads(tiny, clean):
    """Change from 4 to 2, 3 and 4 ranks within an epoch.

    The global batch of each step, assembled from all ranks, must be that of one rank.
    """
    config = tiny("--training.global_batch_tokens", str(12 * tiny().data.sequence_length))
    found = []
    expected = []

    whole = PackedDataset.from_config(config, "train", shuffle=True)
    for begun, ranks in ((0, 4), (3, 2), (6, 3), (9, 4)):
        feeds = [PackedDataset.from_config(config, "train", shuffle=True) for _ in range(ranks)]
        loaders = [loader_of(config, feed, begun, rank, ranks) for rank, feed in enumerate(feeds)]
        for step in range(begun, begun + 3):
            found.append(torch.cat([take(loader, step).tokens for loader in loaders]))
            expected.append(whole.batch(12 * step, 12, CPU).tokens)
        for loader, feed in zip(loaders, feeds, strict=True):
            loader.close()
            feed.close()

    assert len(whole) > 12 * 12, "all inside an epoch"
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


def another(folder: Path, shard: Path):
    """Replace a shard by a valid one of the same size with other content."""
    shard.write_bytes(zstandard.compress(bytes(100)).ljust(shard.stat().st_size, b"\0"))


DAMAGE = [
    (flip, "is damaged"),
    (truncate, "bytes, expected"),
    (remove, "is missing"),
    (empty, "has 0 bytes"),
    (another, "is damaged"),
]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("harm", "message"), DAMAGE, ids=lambda x: getattr(x, "__name__", ""))
def test_damage_names_the_shard_and_leaves_nothing_behind(
    workers, harm, message, tiny, prepared, tmp_path, clean
):
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    shard = next((copy / "train").rglob("*.mds.zstd"))
    harm(copy, shard)
    config = tiny("--data.path", str(copy), "--data.workers", str(workers))
    with pytest.raises(UserError, match=f"shard {shard} .*{message}|shard {shard} {message}"):
        feed = training_dataset(config)
        loader = loader_of(config, feed)
        try:
            for step in range(40):
                take(loader, step)
        finally:
            loader.close()
            feed.close()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["train/index.json", "train/lengths.npy"])
def test_an_index_of_another_folder_is_named(name, workers, tiny, prepared, tmp_path, clean):
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    shutil.copyfile(prepared / name.replace("train", "validation"), copy / name)
    config = tiny("--data.path", str(copy), "--data.workers", str(workers))
    with pytest.raises(
        UserError,
        match=f"{copy / name} is damaged, or not the one that {copy}/manifest.json was written for",
    ):
        training_dataset(config)


SCRIPT = """
import sys, time, torch
from pathlib import Path
from bitlm_dist.config_loading import load_config
from bitlm_dist.data.loader import Loader
from bitlm_dist.data.mixture_dataset import training_dataset
from bitlm_dist.model.batch import TargetFinder

if __name__ == "__main__":
    config = load_config(Path(sys.argv[1])).config
    loader = Loader(
        config,
        training_dataset(config),
        TargetFinder(config.model.block_size, 1, True, None, 8),
        start_step=0,
        first_sequence=0,
        num_sequences=8,
        stride=8,
        device=torch.device("cpu"),
    )
    loader.start(0)
    loader.get()
    print("reading", flush=True)
    time.sleep(600)
"""


def test_workers_die_with_their_parent_and_the_next_start_clears_up(tiny, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "config.yaml").write_text(to_yaml(tiny("--data.workers", "2")))
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "config.yaml")],
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == "reading\n"

        family = psutil.Process(parent.pid).children(recursive=True)
        workers = [p for p in family if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) == 2

        places = [SHARED_MEMORY, Path(tempfile.gettempdir())]
        made = [path for place in places for path in place.glob(f"{OWNER_PREFIX}*")]
        theirs = [
            path for path in made if any(f"-{worker.pid}-" in path.name for worker in workers)
        ]
        assert theirs
        parent.kill()

    assert psutil.wait_procs(family, timeout=10)[1] == []
    remove_stale_resources()
    assert not [path for path in theirs if path.exists()]
