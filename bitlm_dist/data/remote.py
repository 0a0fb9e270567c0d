"""A prepared folder in an object store or on a web server: its small files are copied, its shards are streamed when they are read.

A copy is a prepared folder without shards; ``remote.json`` in it says where they are.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from bitlm_dist.data import http_download
from bitlm_dist.data.manifest import MANIFEST, check_file, read_manifest
from bitlm_dist.data.streaming_import import streaming
from bitlm_dist.errors import UserError
from bitlm_dist.files import sync_folder, sync_tree, to_json, write_atomically

RECORD = "remote.json"
TRIES, TIMEOUT = 5, 60.0  # of one file, with back-off between them: 1, 2, 4, 8 seconds and a little


def url_of(folder: Path) -> str | None:
    """Where the shards of a folder are; None: in it.

    Raises:
        UserError: the record is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged: copy the folder again with `bitlm data mirror`") from None


def mirror(url: str, folder: Path) -> None:
    """Copy the small files of a prepared folder: manifest, tokenizer, statistics, indices.

    Args:
        url: of the prepared folder: s3://, gs://, http(s):// and whatever else streaming has a downloader for.
        folder: must not exist.

    Raises:
        UserError: ``folder`` exists, or a file cannot be fetched or is not the one that the manifest was written for.
    """
    if folder.exists():
        raise UserError(f"{folder} exists: name a folder that does not")
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
    write_atomically(building / RECORD, to_json({"url": url.rstrip("/")}) + "\n")
    sync_tree(building)
    building.rename(folder)
    sync_folder(folder.parent)


class _Fetcher:
    """Fetches files below a URL, each tried a few times."""

    def __init__(self, url: str, folder: Path) -> None:
        http_download.register()
        self._url, self._folder = url, folder
        try:
            self._downloader: Any = streaming("storage").CloudDownloader.get(url)
        except (ValueError, ImportError) as error:
            raise UserError(f"{url} cannot be opened: {' '.join(str(error).split())}") from error
        self._retry = streaming("util").retry(clean_up_fn=self._downloader.clean_up, num_attempts=TRIES)

    def __call__(self, name: str) -> None:
        local = self._folder / name
        local.parent.mkdir(exist_ok=True)
        remote = f"{self._url}/{name}"
        try:
            self._retry(lambda: self._downloader.download(remote, os.fspath(local), TIMEOUT))()
        except Exception as error:  # the libraries of each store raise their own
            raise UserError(f"{remote} cannot be fetched: {' '.join(str(error).split())}") from error
