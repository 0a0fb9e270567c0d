"""Shards in an object store: a real S3 server on loopback."""

import json
from pathlib import Path

import pytest
import torch

from bitlm_dist.data import remote
from bitlm_dist.data.feed import Feed
from bitlm_dist.data.remote import mirror, url_of
from bitlm_dist.data.shards import SPLITS
from bitlm_dist.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(prepared):
    """A bucket that holds the small prepared folder -> (client, its URL)."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_DEFAULT_REGION", "us-east-1")):
            patch.setenv(name, value)
        patch.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setattr(remote, "TRIES", 1)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="bucket")
        for file in (file for file in prepared.rglob("*") if file.is_file()):
            client.upload_file(str(file), "bucket", f"data/{file.relative_to(prepared)}")
        yield client, "s3://bucket/data"
    server.stop()


def feed_of(folder: Path, **more):
    return Feed(folder, "train", block=4, sequence_length=32, seed=3, shuffle=True, **more)


def test_a_copy_without_shards_reads_what_the_folder_reads(store, prepared, tmp_path):
    copy = tmp_path / "copy"
    mirror(store[1], copy, SPLITS)
    assert url_of(copy) == store[1]
    assert not list(copy.rglob("*.mds*"))
    feeds = [feed_of(folder, cache=tmp_path / "cache") for folder in (prepared, copy)]
    assert feeds[0].fingerprint() == feeds[1].fingerprint()
    for first in range(0, len(feeds[0]), 8):
        batches = [feed.batch(first, 8, CPU) for feed in feeds]
        assert torch.equal(batches[0].tokens, batches[1].tokens)
    for feed in feeds:
        feed.close()
    assert list((tmp_path / "cache").rglob("*.mds")), "the cache stays for the next run"
    assert not list(tmp_path.glob(".*"))


def test_what_is_missing_or_damaged_in_the_store_is_named(store, prepared, tmp_path):
    client, url = store
    mirror(url, tmp_path / "copy", SPLITS)
    shard = next((prepared / "train").rglob("*.mds.zstd"))
    key = f"data/{shard.relative_to(prepared)}"
    client.put_object(Bucket="bucket", Key=key, Body=shard.read_bytes()[:-1] + b"!")
    feed = feed_of(tmp_path / "copy")
    with pytest.raises(UserError, match=f"shard s3://bucket/{key} is damaged or cannot be fetched: .*Checksum failure"):
        feed.batch(0, 8, CPU)
    feed.close()
    client.delete_object(Bucket="bucket", Key=key)
    feed = feed_of(tmp_path / "copy")
    with pytest.raises(UserError, match=f"shard s3://bucket/{key} is damaged or cannot be fetched: .*(not found|Not Found)"):
        feed.batch(0, 8, CPU)
    feed.close()
    client.upload_file(str(shard), "bucket", key)


def test_a_store_that_fails_for_a_moment_is_asked_again(store, tmp_path, monkeypatch):
    from streaming.base.storage.download import S3Downloader

    plain, calls = S3Downloader._download_file_impl, []

    def flaky(self, *arguments):
        calls.append(1)
        if len(calls) % 2:
            raise OSError("connection reset")
        return plain(self, *arguments)

    monkeypatch.setattr(S3Downloader, "_download_file_impl", flaky)
    monkeypatch.setattr(remote, "TRIES", 2)
    monkeypatch.setattr("streaming.base.util.sleep", lambda seconds: None)
    mirror(store[1], tmp_path / "copy", SPLITS)
    assert len(calls) > 8


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/none", "s3://bucket/none/manifest.json cannot be fetched"),
        ("ftp://host/data", "ftp://host/data cannot be opened: Unsupported remote path"),
    ],
)
def test_stores_that_cannot_be_read_are_named_and_nothing_is_left(store, url, message, tmp_path):
    with pytest.raises(UserError, match=message):
        mirror(url, tmp_path / "copy", SPLITS)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "copy").mkdir()
    with pytest.raises(UserError, match="copy exists: name a folder that does not"):
        mirror(url, tmp_path / "copy", SPLITS)


def test_a_damaged_record_is_named(prepared, tmp_path):
    (tmp_path / "remote.json").write_text(json.dumps({"uri": "s3://x"}))
    with pytest.raises(UserError, match="remote.json is damaged: copy the folder again"):
        url_of(tmp_path)
