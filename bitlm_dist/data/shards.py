"""Read-only access to the shards of a prepared folder, through mosaicml-streaming.

The folder is the *remote* side of the stream. A cache folder is its *local* side, where shards are
decompressed and their hashes checked. So the library cannot delete or rewrite any file that
`bitlm prep` wrote.
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
from bitlm_dist.data.manifest import check_file, read_manifest
from bitlm_dist.data.remote import remote_url
from bitlm_dist.data.stale_resources import owner_tagged_name, remove_stale_resources
from bitlm_dist.data.streaming_import import as_single_process, import_streaming
from bitlm_dist.disks import check_shared_memory, check_temp_dir, format_bytes, free_bytes
from bitlm_dist.errors import UserError, log_to_stderr
from bitlm_dist.files import DISK_FULL, try_lock
from bitlm_dist.formatting import plural

NUM_SHARED_SEGMENTS = 8  # at least, of shared memory that streaming creates; one page each
BYTES_PER_SHARD = 9  # in two of these segments: state and time of the last access
SPLIT_FILES = ("index.json", "lengths.npy")


def damaged_shards(folder: Path, manifest: Mapping[str, Any], split: str) -> tuple[int, list[str]]:
    """Check every shard of a split against its hash.

    Returns:
        The number of shards, and one message for each that is missing or damaged.

    Raises:
        UserError: The shards are in remote storage, or the index is damaged.
    """
    url = remote_url(folder)
    if url is not None:
        raise UserError(f"{folder} has its shards in {url}: they are hashed when they are read")
    check_file(folder, manifest, f"{split}/index.json")
    shards = _read_index(folder / split)
    problems = []
    for shard in shards:
        file_entry = shard["zip_data"] or shard["raw_data"]
        file = folder / split / file_entry["basename"]
        if not file.is_file():
            problems.append(f"{file} is missing")
            continue

        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha1").hexdigest() != file_entry["hashes"]["sha1"]:
                problems.append(f"{file} is damaged")

    return len(shards), problems


def _split_remedy(manifest: Mapping[str, Any]) -> str:
    """What to do about a split without documents."""
    fraction = manifest.get("settings", {}).get("validation")
    if not fraction:
        return "prepare it with --validation, or read another split"
    return (
        f"no document fell into it (--validation {fraction}): prepare more documents, or a larger "
        "part of them, into a new folder; or read another split"
    )


def _read_index(split: Path) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = json.loads((split / "index.json").read_text())["shards"]
    return shards


def _open_dataset(lock_folder: str, exit_stack: ExitStack, **settings: Any) -> Any:
    """Open a StreamingDataset that leaves no lock files and no shared memory behind.

    streaming puts its lock files into the temporary folder and leaves them there. It also keeps all
    shared memory that it created or attached to until the process ends, so that every later dataset
    attaches to that of all earlier ones. It names shared memory by numbers that all jobs of a
    machine share. Here the names are tagged with the owning process, so that jobs cannot collide
    and the memory of dead processes can be identified.

    Args:
        lock_folder: folder for the lock files.
        exit_stack: releases the shared memory when it is closed.
        **settings: arguments of StreamingDataset.
    """
    memory = import_streaming("shared.memory")
    for module in ("shared.prefix", "dataset"):
        import_streaming(module)._get_path = _owner_tagged_path

    # streaming asks tempfile for the folder of its locks and atexit for its cleanup.
    previous_tempdir = tempfile.tempdir
    tempfile.tempdir = lock_folder
    previous_atexit = memory.atexit
    memory.atexit = types.SimpleNamespace(register=exit_stack.callback)
    try:
        with as_single_process():
            return import_streaming("dataset").StreamingDataset(**settings)
    finally:
        tempfile.tempdir = previous_tempdir
        memory.atexit = previous_atexit


def _acquire_cache_folder(cache: Path, name: str, exit_stack: ExitStack) -> Path:
    """Lock a cache folder for this process until ``exit_stack`` is closed.

    With a common folder, streaming's processes would write the same files at the same time.
    """
    for number in itertools.count():
        folder = cache / f"{name}-{number}"
        folder.mkdir(parents=True, exist_ok=True)

        # The lock file stays open: closing it releases the lock.
        lock = (folder / ".lock").open("w")
        if try_lock(lock):
            exit_stack.callback(lock.close)
            return folder
        lock.close()

    raise AssertionError("there is always another number")


def _owner_tagged_path(number: int, name: str) -> str:
    return owner_tagged_name(f"{number:06}_{name}")


_warned_folders: set[Path] = set()  # folders about whose size this process has warned


class DocumentShards:
    """Random access to the documents of one split.

    Args:
        folder: prepared folder, the output of `bitlm prep`.
        split: ``train`` or ``validation``.
        cache: folder for decompressed shards, with a subfolder for each process that reads at the
            same time; None: a temporary folder.
        seed: seed of :meth:`epoch_order`.
        cache_limit: cache size limit, e.g. ``100gb``. Least recently used shards are evicted. None:
            unlimited.

    Attributes:
        document_lengths: tokens per document, int64.
        fingerprint: SHA-256 of the index, which holds the hashes of all shards.
        location: URL or path of the shards.

    Raises:
        UserError: The split or one of its files is missing or does not match the manifest.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        cache: Path | None = None,
        seed: int = 0,
        cache_limit: str | None = None,
    ) -> None:
        self.folder = folder / split
        manifest = read_manifest(folder)
        if not manifest["splits"][split]["documents"]:
            raise UserError(f"{folder} has no {split} split: {_split_remedy(manifest)}")
        for name in SPLIT_FILES:
            check_file(folder, manifest, f"{split}/{name}")
        self.document_lengths: NDArray[np.int64] = np.load(self.folder / "lengths.npy")
        self.fingerprint: str = manifest["files"][f"{split}/index.json"]
        self._vocab_size: int = manifest["vocabulary"]

        # A missing shard is found now, where that is cheap; remote ones when they are read.
        url = remote_url(folder)
        shards = _read_index(self.folder)
        if url is None:
            self._check_shard_sizes(shards)
        else:
            http_download.register()

        # Before room is measured: the resources of dead processes would count as taken.
        remove_stale_resources()
        self._check_disk_space(shards, cache, cache_limit)
        self._read_error: UserError | None = None
        self.location = f"{url}/{split}" if url else str(self.folder)

        self._dataset = self._open(cache, seed, cache_limit, remote.MAX_ATTEMPTS if url else 1)

    def _open(
        self, cache: Path | None, seed: int, cache_limit: str | None, download_retry: int
    ) -> Any:
        """Open the dataset of the split, with its own temporary and cache folders."""
        temporary_folder = tempfile.mkdtemp(prefix=owner_tagged_name("shards-"))
        exit_stack = ExitStack()
        exit_stack.callback(shutil.rmtree, temporary_folder, ignore_errors=True)
        self._cache = cache or Path(temporary_folder)
        local_folder = _acquire_cache_folder(self._cache, self.fingerprint[:16], exit_stack)
        self._finalizer = weakref.finalize(self, exit_stack.close)  # at exit at the latest

        # One canonical node: the shuffle must not depend on the number of ranks.
        return _open_dataset(
            temporary_folder,
            exit_stack,
            remote=self.location,
            local=str(local_folder),
            batch_size=1,
            validate_hash="xxh64",
            shuffle=True,
            shuffle_seed=seed,
            num_canonical_nodes=1,
            shuffle_block_size=2**18,
            download_retry=download_retry,
            cache_limit=cache_limit,
        )

    def _check_shard_sizes(self, shards: list[dict[str, Any]]) -> None:
        for shard in shards:
            file_entry = shard["zip_data"] or shard["raw_data"]
            file = self.folder / file_entry["basename"]
            size = file.stat().st_size if file.is_file() else None

            if size != file_entry["bytes"]:
                problem = (
                    "is missing"
                    if size is None
                    else f"has {plural(size, 'byte')}, expected {file_entry['bytes']:,}"
                )
                raise UserError(f"shard {file} {problem}: restore it or prepare the data again")

    def _check_disk_space(
        self, shards: list[dict[str, Any]], cache: Path | None, cache_limit: str | None
    ) -> None:
        """Check that shared memory and temporary files have room, and warn if the cache has not.

        Shared memory holds streaming's records of the shards. Without a cache folder, temporary
        files must have room for the largest shard.
        """
        check_shared_memory(
            NUM_SHARED_SEGMENTS * mmap.PAGESIZE + BYTES_PER_SHARD * len(shards), "reading the data"
        )
        sizes = [
            sum(part["bytes"] for part in (shard["zip_data"], shard["raw_data"]) if part)
            for shard in shards
        ]
        check_temp_dir(
            max(sizes) if cache is None else 0,
            "reading the data without data.cache" if cache is None else "reading",
        )

        # One warning per job and folder: from the main process of rank 0.
        total = sum(shard["raw_data"]["bytes"] for shard in shards)
        folder = Path(tempfile.gettempdir())
        free = free_bytes(folder)
        should_warn = (
            os.environ.get("RANK", "0") == "0"
            and multiprocessing.parent_process() is None
            and self.folder not in _warned_folders
        )
        if cache is None and cache_limit is None and total > free and should_warn:
            _warned_folders.add(self.folder)
            log_to_stderr(
                f"warning: {folder} has {format_bytes(free)} free, and the shards of {self.folder} "
                f"take {format_bytes(total)} there, for every process that reads them: set "
                "data.cache_limit, or data.cache to a folder on another disk"
            )

    def epoch_order(self, epoch: int) -> NDArray[np.int64]:
        """Return all documents in the shuffled order of an epoch.

        streaming shuffles for a world of size 1, so the order is the same for any number of ranks.
        """
        world = import_streaming("world").World(1, 1, 1, 0)
        work = import_streaming("batching").generate_work(
            self._dataset.batching_method, self._dataset, world, epoch, 0
        )

        # Negative ids are streaming's padding.
        ids: NDArray[np.int64] = work.flatten()
        return ids[ids >= 0]

    def order_fingerprint(self) -> dict[str, Any]:
        """Return the settings that determine :meth:`epoch_order`, besides the seed and the index.

        Another version of streaming or numpy may shuffle differently with the same settings. A hash
        of the order of epoch 0 reveals that.
        """
        data = self._dataset
        return {
            "shuffle_algorithm": data.shuffle_algo,
            "shuffle_block_size": data.shuffle_block_size,
            "canonical_nodes": data.num_canonical_nodes,
            "order": hashlib.sha256(self.epoch_order(0).tobytes()).hexdigest(),
        }

    def tokens(self, document: int) -> NDArray[np.integer[Any]]:
        """Read the token ids of one document.

        Raises:
            UserError: The shard is damaged, or the disk of the cache is full. All later calls raise
                the same error.
        """
        # After a failure, streaming would wait forever for the same shard.
        if self._read_error is not None:
            raise self._read_error

        try:
            tokens: NDArray[np.integer[Any]] = self._dataset[int(document)]["tokens"]
        # Each store's library has exceptions of its own.
        except Exception as error:
            self._read_error = UserError(f"shard {self._shard_of(document)} {self._explain(error)}")
            raise self._read_error from error

        # The hash of the shard is right by now, but the index or the vocabulary may be another's.
        if len(tokens) != self.document_lengths[document]:
            raise UserError(
                f"{self.folder}: document {document} has {plural(len(tokens), 'token')}, "
                f"expected {self.document_lengths[document]}"
            )
        if len(tokens) and tokens.max() >= self._vocab_size:
            raise UserError(
                f"shard {self._shard_of(document)} has token {tokens.max()} "
                f"in document {document}, but the vocabulary has {self._vocab_size}: "
                "prepare the data again"
            )
        return tokens

    def _shard_of(self, document: int) -> str:
        shard, _ = self._dataset.spanner[int(document)]
        info = self._dataset.shards[shard]
        return f"{self.location}/{(info.zip_data or info.raw_data).basename}"

    def _explain(self, error: Exception) -> str:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return (
                f"does not fit on the disk of the cache {self._cache}: "
                "make room, set data.cache_limit or another data.cache"
            )
        return f"is damaged or cannot be fetched: restore it or prepare the data again ({error})"

    def close(self) -> None:
        """Remove the temporary folder and the shared memory, and release the cache folder."""
        self._finalizer()

    def __enter__(self) -> "DocumentShards":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
