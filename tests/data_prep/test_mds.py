import json

import numpy as np
import pytest
import zstandard

from bitlm_dist.data.streaming_import import import_streaming
from bitlm_dist.data_prep import mds


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("limit", [1 << 26, 3000])
def test_shards_are_those_of_the_library(tmp_path, seed, dtype, limit, monkeypatch):
    """Equal byte for byte before compression, with equal entries in the index."""
    monkeypatch.setattr(mds, "SHARD_BYTES", limit)
    rng = np.random.default_rng(seed)
    lengths = [1, 255, 256, 700, *rng.integers(1, 300, 20).tolist(), 70_000]
    documents = [rng.integers(0, 2**16, n).astype(dtype) for n in lengths]

    mine = tmp_path / "mine"
    theirs = tmp_path / "theirs"
    mine.mkdir()
    shards = mds.write_shards(mine, documents, dtype)

    settings = {
        "compression": f"zstd:{mds.ZSTD_LEVEL}",
        "hashes": ["sha1", "xxh64"],
        "size_limit": limit,
    }
    with import_streaming("format").MDSWriter(
        out=str(theirs), columns={"tokens": f"ndarray:{dtype}"}, **settings
    ) as writer:
        for tokens in documents:
            writer.write({"tokens": tokens})

    expected = json.loads((theirs / "index.json").read_text())["shards"]
    assert len(shards) == len(expected) == (1 if limit > 3000 else len(shards)) >= 1
    for ours, other in zip(shards, expected, strict=True):
        assert {**ours, "zip_data": None} == {**other, "zip_data": None}
        assert set(ours["zip_data"]) == set(other["zip_data"])
        name = ours["zip_data"]["basename"]
        unpack = zstandard.ZstdDecompressor().decompress
        assert unpack((mine / name).read_bytes()) == unpack((theirs / name).read_bytes())
        assert (mine / name).stat().st_size == ours["zip_data"]["bytes"]

    again = [
        tokens
        for shard in shards
        for tokens in mds.read_documents(mine / shard["zip_data"]["basename"], dtype)
    ]
    assert len(again) == len(documents)
    assert all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(again, documents, strict=True)
    )
