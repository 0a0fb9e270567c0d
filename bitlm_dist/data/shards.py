"""The shards of a prepared folder, read through mosaicml-streaming and never altered.

The folder is the stream's *remote*; a cache folder is its *local* side, where shards are decompressed and their hashes checked. So
the library cannot delete or rewrite what `bitlm prep` wrote.
"""

import hashlib
import importlib
import json
import os
import random
import shutil
import tempfile
import time
import types
import weakref
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitlm_dist.data.streaming_import import alone, import_streaming
from bitlm_dist.errors import UserError

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
SPLITS = ("train", "validation")
OPEN_TRIES = 20


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        UserError: the folder is missing, empty, of another version, or its preparation did not finish.
    """
    if not folder.is_dir():
        raise UserError(f"data.path = {folder} does not exist: prepare it with `bitlm prep FILE --tokenizer T --out {folder}`")
    if not (folder / MANIFEST).is_file():
        state = "is not finished: run the same" if (folder / "settings.json").is_file() else "holds no shards: run"
        raise UserError(f"data.path = {folder} {state} `bitlm prep … --out {folder}` (no {MANIFEST})")
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    if manifest.get("version") != MANIFEST_VERSION:
        raise UserError(
            f"data.path = {folder} has version {manifest.get('version')}, this bitlm reads {MANIFEST_VERSION}: "
            "prepare the data again into a new folder"
        )
    return manifest


def _open(locks: str, release: ExitStack, **settings: Any) -> Any:
    """A StreamingDataset whose lock files live in the folder ``locks`` and whose shared memory ends with ``release``.

    streaming puts its locks into the temporary folder and leaves them there; and it keeps all memory that it created or looked
    at until the process ends, so that every later dataset opens that of all before it. Another process, perhaps a rank of the same
    job, may take the same shared-memory name between streaming's look and its grab: try again.
    """
    streaming = import_streaming()
    memory: Any = importlib.import_module("streaming.base.shared.memory")
    outside, tempfile.tempdir = tempfile.tempdir, locks
    exits, memory.atexit = memory.atexit, types.SimpleNamespace(register=release.callback)
    try:
        with alone():
            for _ in range(OPEN_TRIES - 1):
                try:
                    return streaming.StreamingDataset(**settings)
                except FileExistsError:
                    time.sleep(random.uniform(0.01, 0.2))
            return streaming.StreamingDataset(**settings)
    finally:
        tempfile.tempdir, memory.atexit = outside, exits


class Shards:
    """Random access to the documents of one split.

    Args:
        folder: what `bitlm prep` wrote.
        split: ``train`` or ``validation``.
        cache: folder for decompressed shards, in it one for each process of the machine; None: a temporary one, removed on close.
        seed: of :meth:`order`.

    Attributes:
        lengths: tokens of each document, int64.
        fingerprint: SHA-256 of the index, which holds the hashes of all shards.

    Raises:
        UserError: the split, its index or a shard is missing or has another size; the message names the file.
    """

    def __init__(self, folder: Path, split: str, cache: Path | None = None, seed: int = 0) -> None:
        self.folder = folder / split
        index = self.folder / "index.json"
        if not index.is_file():
            raise UserError(
                f"{folder} has no {split} split ({index} is missing): prepare it with --validation, or read another split"
            )
        self.lengths: NDArray[np.int64] = np.load(self.folder / "lengths.npy")
        self.fingerprint = hashlib.sha256(index.read_bytes()).hexdigest()
        self._check_files(json.loads(index.read_text())["shards"])
        temporary = tempfile.mkdtemp(prefix="bitlm-shards-")
        local = f"{self.fingerprint[:16]}-{os.environ.get('LOCAL_RANK', '0')}"
        release = ExitStack()
        release.callback(shutil.rmtree, temporary, ignore_errors=True)
        self._remove = weakref.finalize(self, release.close)  # at exit at the latest
        self._dataset = _open(
            temporary,
            release,
            remote=str(self.folder),
            local=str((cache or Path(temporary)) / local),
            batch_size=1,
            validate_hash="xxh64",
            shuffle=True,
            shuffle_seed=seed,
            num_canonical_nodes=1,
            shuffle_block_size=2**18,
            download_retry=1,
        )

    def _check_files(self, shards: list[dict[str, Any]]) -> None:
        samples = sum(shard["samples"] for shard in shards)
        if samples != len(self.lengths):
            raise UserError(f"{self.folder}: index.json has {samples} documents, lengths.npy {len(self.lengths)}: prepare again")
        for shard in shards:
            part = shard["zip_data"] or shard["raw_data"]
            file = self.folder / part["basename"]
            size = file.stat().st_size if file.is_file() else None
            if size != part["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes, expected {part['bytes']}"
                raise UserError(f"shard {file} {state}: restore it or prepare the data again")

    def order(self, epoch: int) -> NDArray[np.int64]:
        """All documents in an epoch's shuffled order: streaming's shuffle for a world of one, so no rank count changes it."""
        from streaming.base.batching import generate_work
        from streaming.base.world import World

        work = generate_work(self._dataset.batching_method, self._dataset, World(1, 1, 1, 0), epoch, 0)
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
            UserError: its shard is damaged.
        """
        try:
            tokens: NDArray[np.integer[Any]] = self._dataset[int(document)]["tokens"]
        except (RuntimeError, ValueError, OSError) as error:
            shard, _ = self._dataset.spanner[int(document)]
            info = self._dataset.shards[shard]
            part = info.zip_data or info.raw_data
            file = self.folder / part.basename
            raise UserError(f"shard {file} is damaged: restore it or prepare the data again ({error})") from error
        if len(tokens) != self.lengths[document]:
            raise UserError(f"{self.folder}: document {document} has {len(tokens)} tokens, expected {self.lengths[document]}")
        return tokens

    def close(self) -> None:
        """Remove the temporary folder and the shared memory."""
        self._remove()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
