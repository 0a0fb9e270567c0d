"""The shards of a prepared folder, read through mosaicml-streaming and never altered.

The folder is the stream's *remote*; a cache folder is its *local* side, where shards are decompressed and their hashes checked. So
the library cannot delete or rewrite what `bitlm prep` wrote.
"""

import hashlib
import itertools
import json
import mmap
import multiprocessing
import os
import shutil
import tempfile
import types
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitlm_dist.data import http_download, remote
from bitlm_dist.data.leftovers import owned_name, remove_leftovers
from bitlm_dist.data.manifest import check_file, read_manifest
from bitlm_dist.data.remote import url_of
from bitlm_dist.data.streaming_import import alone, streaming
from bitlm_dist.disks import check_shared_memory, check_temporary, free_bytes, in_words
from bitlm_dist.errors import UserError, say
from bitlm_dist.files import DISK_FULL, try_lock

SEGMENTS = 8  # of shared memory that streaming makes, at least; a page each
BYTES_A_SHARD = 9  # in two of them: state and time of the last access
SPLIT_FILES = ("index.json", "lengths.npy")


def damaged_shards(folder: Path, manifest: Mapping[str, Any], split: str) -> tuple[int, list[str]]:
    """Hash every shard of a split again -> how many there are, and what is wrong with which.

    Raises:
        UserError: the shards lie elsewhere, or the index is damaged.
    """
    url = url_of(folder)
    if url is not None:
        raise UserError(f"{folder} has its shards in {url}: they are hashed when they are read")
    check_file(folder, manifest, f"{split}/index.json")
    shards, problems = _read_index(folder / split), []
    for shard in shards:
        part = shard["zip_data"] or shard["raw_data"]
        file = folder / split / part["basename"]
        if not file.is_file():
            problems.append(f"{file} is missing")
            continue
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha1").hexdigest() != part["hashes"]["sha1"]:
                problems.append(f"{file} is damaged")
    return len(shards), problems


def _read_index(split: Path) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = json.loads((split / "index.json").read_text())["shards"]
    return shards


def _open(locks: str, release: ExitStack, **settings: Any) -> Any:
    """A StreamingDataset whose lock files live in the folder ``locks`` and whose shared memory ends with ``release``.

    streaming puts its locks into the temporary folder and leaves them there; and it keeps all memory that it created or looked
    at until the process ends, so that every later dataset opens that of all before it. Its names for shared memory are numbers that
    all jobs of a machine share; here they are this process's own, so that no job meets another's and those of dead ones are known.
    """
    memory = streaming("shared.memory")
    for module in ("shared.prefix", "dataset"):
        streaming(module)._get_path = _own_path
    outside, tempfile.tempdir = tempfile.tempdir, locks
    exits, memory.atexit = memory.atexit, types.SimpleNamespace(register=release.callback)
    try:
        with alone():
            return streaming("dataset").StreamingDataset(**settings)
    finally:
        tempfile.tempdir, memory.atexit = outside, exits


def _claim_cache(cache: Path, name: str, release: ExitStack) -> Path:
    """A folder that no other process uses until ``release``: streaming's processes would write the same files at the same time."""
    for number in itertools.count():
        folder = cache / f"{name}-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
        if try_lock(lock):
            release.callback(lock.close)
            return folder
        lock.close()
    raise AssertionError("there is always another number")


def _own_path(number: int, name: str) -> str:
    return owned_name(f"{number:06}_{name}")


_warned: set[Path] = set()  # folders whose size this process has warned of


class Shards:
    """Random access to the documents of one split.

    Args:
        folder: what `bitlm prep` wrote.
        split: ``train`` or ``validation``.
        cache: folder for decompressed shards, in it one for each process that reads at the same time; None: a temporary one.
        seed: of :meth:`order`.
        cache_limit: bytes that the cache may take, e.g. ``100gb``: the shards that were not read for longest go; None: no limit.

    Attributes:
        lengths: tokens of each document, int64.
        fingerprint: SHA-256 of the index, which holds the hashes of all shards.

    Raises:
        UserError: the split or a file of it is missing or is not that of the manifest; the message names it.
    """

    def __init__(self, folder: Path, split: str, cache: Path | None = None, seed: int = 0, cache_limit: str | None = None) -> None:
        self.folder, manifest = folder / split, read_manifest(folder)
        if not manifest["splits"][split]["documents"]:
            raise UserError(f"{folder} has no {split} split: prepare it with --validation, or read another split")
        for name in SPLIT_FILES:
            check_file(folder, manifest, f"{split}/{name}")
        self.lengths: NDArray[np.int64] = np.load(self.folder / "lengths.npy")
        self.fingerprint: str = manifest["files"][f"{split}/index.json"]
        self._vocabulary: int = manifest["vocabulary"]
        url, shards = url_of(folder), _read_index(self.folder)
        if url is None:
            self._check_sizes(shards)
        else:
            http_download.register()
        remove_leftovers()
        self._check_room(shards, cache, cache_limit)
        self._damage: UserError | None = None
        self.source = f"{url}/{split}" if url else str(self.folder)  # where the shards are
        temporary = tempfile.mkdtemp(prefix=owned_name("shards-"))
        release = ExitStack()
        release.callback(shutil.rmtree, temporary, ignore_errors=True)
        self._cache = cache or Path(temporary)
        local = _claim_cache(self._cache, self.fingerprint[:16], release)
        self._remove = weakref.finalize(self, release.close)  # at exit at the latest
        self._dataset = _open(
            temporary,
            release,
            remote=self.source,
            local=str(local),
            batch_size=1,
            validate_hash="xxh64",
            shuffle=True,
            shuffle_seed=seed,
            num_canonical_nodes=1,
            shuffle_block_size=2**18,
            download_retry=remote.TRIES if url else 1,
            cache_limit=cache_limit,
        )

    def _check_sizes(self, shards: list[dict[str, Any]]) -> None:
        for shard in shards:
            part = shard["zip_data"] or shard["raw_data"]
            file = self.folder / part["basename"]
            size = file.stat().st_size if file.is_file() else None
            if size != part["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes, expected {part['bytes']}"
                raise UserError(f"shard {file} {state}: restore it or prepare the data again")

    def _check_room(self, shards: list[dict[str, Any]], cache: Path | None, cache_limit: str | None) -> None:
        """Shared memory for streaming's records of the shards; room for the largest of them where the cache is temporary."""
        check_shared_memory(SEGMENTS * mmap.PAGESIZE + BYTES_A_SHARD * len(shards), "reading the data")
        sizes = [sum(part["bytes"] for part in (shard["zip_data"], shard["raw_data"]) if part) for shard in shards]
        check_temporary(max(sizes) if cache is None else 0, "reading the data without data.cache" if cache is None else "reading")
        total, folder = sum(shard["raw_data"]["bytes"] for shard in shards), Path(tempfile.gettempdir())
        free = free_bytes(folder)
        speaks = os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None and self.folder not in _warned
        if cache is None and cache_limit is None and total > free and speaks:
            _warned.add(self.folder)
            say(
                f"warning: {folder} has {in_words(free)} free, and the shards of {self.folder} take {in_words(total)} "
                "there, for every process that reads them: set data.cache_limit, or data.cache to a folder on another disk"
            )

    def order(self, epoch: int) -> NDArray[np.int64]:
        """All documents in an epoch's shuffled order: streaming's shuffle for a world of one, so no rank count changes it."""
        world = streaming("world").World(1, 1, 1, 0)
        work = streaming("batching").generate_work(self._dataset.batching_method, self._dataset, world, epoch, 0)
        ids: NDArray[np.int64] = work.flatten()
        return ids[ids >= 0]

    def order_fingerprint(self) -> dict[str, Any]:
        """What decides :meth:`order` beside the seed and the index: streaming's settings, and a hash of what they make of epoch 0.

        Another version of streaming or numpy may shuffle otherwise under the same settings; the hash tells.
        """
        data = self._dataset
        return {
            "shuffle_algorithm": data.shuffle_algo,
            "shuffle_block_size": data.shuffle_block_size,
            "canonical_nodes": data.num_canonical_nodes,
            "order": hashlib.sha256(self.order(0).tobytes()).hexdigest(),
        }

    def tokens(self, document: int) -> NDArray[np.integer[Any]]:
        """The token ids of one document.

        Raises:
            UserError: its shard is damaged, or one that was read before; or the disk of the cache is full.
        """
        if self._damage is not None:  # streaming waits for ever for a shard that once failed
            raise self._damage
        try:
            tokens: NDArray[np.integer[Any]] = self._dataset[int(document)]["tokens"]
        except Exception as error:  # the libraries of each store raise their own
            self._damage = UserError(f"shard {self._shard_of(document)} {self._explain(error)}")
            raise self._damage from error
        if len(tokens) != self.lengths[document]:
            raise UserError(f"{self.folder}: document {document} has {len(tokens)} tokens, expected {self.lengths[document]}")
        if len(tokens) and tokens.max() >= self._vocabulary:
            raise UserError(
                f"shard {self._shard_of(document)} has token {tokens.max()} in document {document}, but the vocabulary has "
                f"{self._vocabulary}: prepare the data again"
            )
        return tokens

    def _shard_of(self, document: int) -> str:
        shard, _ = self._dataset.spanner[int(document)]
        info = self._dataset.shards[shard]
        return f"{self.source}/{(info.zip_data or info.raw_data).basename}"

    def _explain(self, error: Exception) -> str:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return f"does not fit on the disk of the cache {self._cache}: make room, set data.cache_limit or another data.cache"
        return f"is damaged or cannot be fetched: restore it or prepare the data again ({error})"

    def close(self) -> None:
        """Remove the temporary folder and the shared memory."""
        self._remove()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
