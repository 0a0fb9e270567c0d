"""Shards in an object store and on a web server, with real servers on loopback."""

import json
import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from bitlm_dist.data import remote
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.data.remote import mirror, remote_url
from bitlm_dist.data.streaming_import import import_streaming
from bitlm_dist.errors import UserError

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")


class Bucket:
    """Small prepared folder in S3."""

    def __init__(self, prepared: Path, endpoint: str) -> None:
        import boto3

        self.url = "s3://bucket/data"
        self._client = boto3.client("s3", endpoint_url=endpoint)
        self._client.create_bucket(Bucket="bucket")
        for file in (file for file in prepared.rglob("*") if file.is_file()):
            self.put(file.relative_to(prepared).as_posix(), file.read_bytes())

    def put(self, name: str, content: bytes) -> None:
        self._client.put_object(Bucket="bucket", Key=f"data/{name}", Body=content)

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket="bucket", Key=f"data/{name}")


class Site:
    """Small prepared folder on a web server."""

    def __init__(self, folder: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/data"
        self._folder = folder

    def put(self, name: str, content: bytes) -> None:
        (self._folder / name).write_bytes(content)

    def delete(self, name: str) -> None:
        (self._folder / name).unlink()


@pytest.fixture(scope="module", autouse=True)
def one_try():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "MAX_ATTEMPTS", 1)
        yield


@pytest.fixture(scope="module")
def bucket(prepared):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "x"),
            ("AWS_SECRET_ACCESS_KEY", "x"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        patch.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
        yield Bucket(prepared, f"http://{host}:{port}")
    server.stop()


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def site(prepared, tmp_path_factory):
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(prepared, root / "data")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield Site(root / "data", server.server_port)
        server.shutdown()
        thread.join()


@pytest.fixture(params=["bucket", "site"])
def store(request) -> Bucket | Site:
    found: Bucket | Site = request.getfixturevalue(request.param)
    return found


def feed_of(folder: Path, **more):
    return PackedDataset(
        folder, "train", block_size=4, sequence_length=32, seed=3, shuffle=True, **more
    )


def test_a_copy_without_shards_reads_what_the_folder_reads(store, prepared, tmp_path):
    copy = tmp_path / "copy"
    mirror(store.url, copy)
    assert remote_url(copy) == store.url
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
    mirror(store.url, tmp_path / "copy")
    shard = next((prepared / "train").rglob("*.mds.zstd"))
    name = shard.relative_to(prepared).as_posix()
    content = shard.read_bytes()
    for harm, message in (
        (lambda: store.put(name, content[:-1] + b"!"), "Checksum failure"),
        (lambda: store.delete(name), "(?i:not found)|No such file|FileNotFound|404|/data/"),
    ):
        harm()
        feed = feed_of(tmp_path / "copy")
        with pytest.raises(
            UserError,
            match=f"shard {store.url}/{name} is damaged or cannot be fetched: .*({message})",
        ):
            feed.batch(0, 8, CPU)
        feed.close()
    store.put(name, content)


def test_a_small_file_that_is_not_the_manifest_s_is_named_and_nothing_is_left(
    store, prepared, tmp_path
):
    name = "validation/index.json"
    store.put(name, (prepared / "train/index.json").read_bytes())
    with pytest.raises(UserError, match=f"{name} is damaged, or not the one that"):
        mirror(store.url, tmp_path / "copy")
    store.put(name, (prepared / name).read_bytes())
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_fails_for_a_moment_is_asked_again(bucket, tmp_path, monkeypatch):
    downloader = import_streaming("storage.download").S3Downloader
    plain = downloader._download_file_impl
    calls = []

    def flaky(self, *arguments):
        calls.append(1)
        if len(calls) % 2:
            raise OSError("connection reset")
        return plain(self, *arguments)

    monkeypatch.setattr(downloader, "_download_file_impl", flaky)
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 2)
    monkeypatch.setattr(import_streaming("util"), "sleep", lambda seconds: None)
    mirror(bucket.url, tmp_path / "copy")
    assert len(calls) > 8


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/none", "s3://bucket/none/manifest.json cannot be fetched"),
        (
            "http://127.0.0.1:9/data",
            "http://127.0.0.1:9/data/manifest.json cannot be fetched: Cannot connect",
        ),
        ("ftp://host/data", "ftp://host/data cannot be opened: Unsupported remote path"),
    ],
)
def test_stores_that_cannot_be_read_are_named_and_nothing_is_left(bucket, url, message, tmp_path):
    with pytest.raises(UserError, match=message):
        mirror(url, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "copy").mkdir()
    with pytest.raises(UserError, match="copy exists: name a folder that does not"):
        mirror(url, tmp_path / "copy")


def test_a_damaged_record_is_named(prepared, tmp_path):
    (tmp_path / "remote.json").write_text(json.dumps({"uri": "s3://x"}))
    with pytest.raises(UserError, match="remote.json is damaged: copy the folder again"):
        remote_url(tmp_path)
