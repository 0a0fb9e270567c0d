"""Prepared folders in an object store or on a web server.

A mirror is a local copy of the small files of a prepared folder, without the shards. Its
``remote.json`` holds the URL of the shards, which are streamed when they are read.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from bitlm_dist.data import http_download
from bitlm_dist.data.manifest import MANIFEST, check_file, read_manifest
from bitlm_dist.data.streaming_import import import_streaming
from bitlm_dist.errors import UserError
from bitlm_dist.files import fsync_folder, fsync_tree, write_atomically
from bitlm_dist.paths import check_absent
from bitlm_dist.strict_json import to_json

REMOTE_FILE = "remote.json"
MAX_ATTEMPTS = 5  # per file, with back-off between them: 1, 2, 4 and 8 seconds plus jitter
TIMEOUT = 60.0  # seconds per attempt


def remote_url(folder: Path) -> str | None:
    """Return the URL of a folder's shards, or None if the shards are in the folder.

    Raises:
        UserError: remote.json is damaged.
    """
    file = folder / REMOTE_FILE
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} is damaged: copy the folder again with `bitlm data mirror`"
        ) from None


def mirror(url: str, folder: Path) -> None:
    """Copy the small files of a prepared folder: manifest, tokenizer, statistics, indices.

    Args:
        url: prepared folder: s3://, gs://, http(s):// or any other URL that streaming can download.
        folder: destination, which must not exist.

    Raises:
        UserError: ``folder`` exists, or a file cannot be fetched or does not match the manifest.
    """
    check_absent(folder)

    # Built under another name and renamed at the end: the mirror is either complete or absent.
    building = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        fetch = _Fetcher(url.rstrip("/"), building)
        fetch(MANIFEST)
        manifest = read_manifest(building)
        for name in manifest["files"]:
            fetch(name)
            check_file(building, manifest, name)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise

    write_atomically(building / REMOTE_FILE, to_json({"url": url.rstrip("/")}) + "\n")
    fsync_tree(building)
    building.rename(folder)
    fsync_folder(folder.parent)


class _Fetcher:
    """Fetches files below a URL, with retries."""

    def __init__(self, url: str, folder: Path) -> None:
        http_download.register()
        self._url = url
        self._folder = folder

        try:
            self._downloader: Any = import_streaming("storage").CloudDownloader.get(url)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"{url} cannot be opened: {' '.join(str(error).split())}: "
                "use s3://bucket/folder, gs://… or https://…"
            ) from error

        self._with_retries = import_streaming("util").retry(
            clean_up_fn=self._downloader.clean_up, num_attempts=MAX_ATTEMPTS
        )

    def __call__(self, name: str) -> None:
        local = self._folder / name
        local.parent.mkdir(exist_ok=True)
        remote = f"{self._url}/{name}"
        try:
            self._with_retries(
                lambda: self._downloader.download(remote, os.fspath(local), TIMEOUT)
            )()
        # Each store's library has exceptions of its own.
        except Exception as error:
            raise UserError(
                f"{remote} cannot be fetched: {' '.join(str(error).split())}: "
                "check the URL and your access to it"
            ) from error
