"""Asynchronous checkpoints, at most one at a time.

Every rank copies its part into host memory and resumes training, while a background thread writes,
hashes and flushes the rank's file. These threads do not communicate with other ranks: between two
steps the ranks agree that all files are written, and rank 0 completes the folder.
"""

import logging
import shutil
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.checkpoint.steps import folder_of
from bitlm_dist.checkpoint.store import SaveError
from bitlm_dist.checkpoint.tensors import TORCH_DTYPES, FileDigest, ShardEntry
from bitlm_dist.errors import os_error_message
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.sharded_tensor import ShardedTensor

log = logging.getLogger(__name__)
ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class SaveStats:
    """Cost of a completed checkpoint; times are those of rank 0."""

    step: int
    stall_seconds: float  # during which training was blocked
    total_seconds: float
    bytes: int  # of all ranks' files
    copy_bytes: int  # size of the host buffer, the maximum over ranks


class _Writer(Thread):
    """Writes one file in the background.

    Attributes:
        digest: Size and hash of the file; None until it is written.
        problem: Why it could not be written; empty if it was.
    """

    def __init__(
        self, file: Path, entries: Sequence[ShardEntry], tensors: Sequence[Tensor]
    ) -> None:
        # A daemon, so that an exiting process does not wait for a save that nobody will complete.
        super().__init__(daemon=True, name="checkpoint")
        self._file = file
        self._entries = entries
        self._tensors = tensors
        self.digest: FileDigest | None = None
        self.problem = ""

    @override
    def run(self) -> None:
        try:
            self.digest = tensor_files.write_safetensors(self._file, self._entries, self._tensors)
        except OSError as error:
            self.problem = os_error_message(error)
        except Exception as error:
            self.problem = str(error) or type(error).__name__


class _HostBuffer:
    """One contiguous buffer in host memory for a rank's shards."""

    def __init__(self, entries: Sequence[ShardEntry]) -> None:
        ends = [0]
        for entry in entries:
            ends.append(ends[-1] + -(-entry.num_bytes // ALIGNMENT) * ALIGNMENT)

        self._memory = torch.empty(ends[-1], dtype=torch.uint8)
        if mesh.device().type == "cuda" and ends[-1]:
            _pin_memory(self._memory)

        views = (
            (self._memory[a : a + e.num_bytes], e) for a, e in zip(ends, entries, strict=False)
        )
        self.tensors = [
            view.view(TORCH_DTYPES[entry.dtype]).view(entry.sizes) for view, entry in views
        ]

    @property
    def num_bytes(self) -> int:
        """Size of the buffer."""
        return len(self._memory)

    def copy_from(self, tensors: Sequence[Tensor]) -> None:
        """Copy tensors into the buffer; they may change as soon as this returns."""
        for buffer, tensor in zip(self.tensors, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        if mesh.device().type == "cuda":
            torch.cuda.current_stream().synchronize()


def _pin_memory(memory: Tensor) -> None:
    """Page-lock host memory for fast copies from the GPU; if that fails, warn and use it unlocked.

    ``pin_memory=True`` would waste up to half of the memory, as torch's allocator of pinned memory
    rounds sizes up to powers of two.
    """
    cudart = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(memory.data_ptr(), len(memory), 0))
    if code == 0:
        weakref.finalize(memory.untyped_storage(), cudart.cudaHostUnregister, memory.data_ptr())
        return

    log.warning(
        "%.1f GiB of host memory could not be locked (CUDA error %d): saves take longer",
        len(memory) / 2**30,
        code,
    )
    # CUDA keeps the error, and the next launch would report it as its own: consume it here.
    with suppress(RuntimeError):
        torch.zeros(1, device=mesh.device())


class Saver:
    """Saves the checkpoints of one run.

    Collective: all ranks must construct one and call its methods in the same order. A shard that
    several ranks hold is written by one of them. The host memory for what this rank writes
    (:attr:`host_buffer_bytes`) is allocated once and reused by all saves.

    Args:
        root: The run's ``checkpoints`` folder.
        layout: The job's parallel layout.
    """

    def __init__(self, root: Path, layout: ParallelLayout) -> None:
        self._root = root
        self._layout = layout
        # What each rank writes. It is the same in every save of a job, so ranks agree on it once.
        self._entries_per_rank: list[list[ShardEntry]] | None = None
        self._host_buffer: _HostBuffer | None = None
        self._writer: _Writer | None = None

        # The pending save.
        self._step = 0
        self._train_state = dict[str, Any]()
        self._start_time = self._stall_seconds = 0.0

    @property
    def host_buffer_bytes(self) -> int:
        """Size of this rank's host buffer; 0 before the first save."""
        return 0 if self._host_buffer is None else self._host_buffer.num_bytes

    @property
    def has_pending_save(self) -> bool:
        """True if a save was started that :meth:`finish_save` has not completed."""
        return self._writer is not None

    @property
    def is_writing(self) -> bool:
        """True while this rank's file of the pending save is being written."""
        return self._writer is not None and self._writer.is_alive()

    def start_save(
        self,
        step: int,
        tensors: Mapping[str, ShardedTensor],
        train_state: Mapping[str, Any],
        start_time: float | None = None,
    ) -> None:
        """Copy a checkpoint's contents and start writing them.

        The caller may change the tensors as soon as this returns.

        Args:
            step: The checkpoint's step.
            tensors: This rank's shards, by tensor name.
            train_state: Step, counters and metadata, as JSON values.
            start_time: When the caller began to collect the contents, by ``time.perf_counter``;
                default: now.

        Raises:
            SaveError: On every rank, if the folder could not be created.
        """
        assert not self.has_pending_save, "finish the save before this one"
        self._start_time = time.perf_counter() if start_time is None else start_time
        self._step = step
        self._train_state = dict(train_state)

        local_tensors = tensor_files.local_entries(tensors)
        if self._entries_per_rank is None:
            self._entries_per_rank = tensor_files.assign_writers(
                mesh.all_gather_object(list(local_tensors), self._layout)
            )
        entries_to_write = self._entries_per_rank[self._layout.rank]

        self._run_on_rank_0(lambda: store.create_partial_folder(self._root, step))
        file = store.partial_folder_of(self._root, step) / store.rank_file_name(self._layout.rank)
        try:
            self._host_buffer = self._host_buffer or _HostBuffer(entries_to_write)
            self._host_buffer.copy_from([local_tensors[entry] for entry in entries_to_write])
            self._writer = _Writer(file, entries_to_write, self._host_buffer.tensors)
            self._writer.start()
        except (RuntimeError, MemoryError) as error:
            # This rank is out of memory. The others learn of it in finish_save, where all raise.
            self._writer = _Writer(file, [], [])
            self._writer.problem = str(error)
        self._stall_seconds = time.perf_counter() - self._start_time

    def finish_save(self) -> SaveStats:
        """Wait until every rank's file is written, and complete the checkpoint.

        Raises:
            SaveError: On every rank, if one of them could not write. Earlier checkpoints are
                unchanged.
        """
        assert self._writer is not None
        assert self._entries_per_rank is not None
        start_time = time.perf_counter()

        if self._writer.ident is not None:  # None: it was never started
            self._writer.join()
        reports = mesh.all_gather_object(
            (self._writer.digest, self._writer.problem, self.host_buffer_bytes), self._layout
        )
        self._writer = None

        problems = [
            f"rank {rank}: {problem}" for rank, (_, problem, _) in enumerate(reports) if problem
        ]
        if problems:
            self._raise_save_error(
                problems[0] if self._layout.world_size > 1 else problems[0].partition(": ")[2]
            )

        digests = [digest for digest, _, _ in reports]
        entries_per_rank = self._entries_per_rank
        self._run_on_rank_0(
            lambda: store.finalize(
                self._root, self._step, self._train_state, entries_per_rank, digests
            )
        )

        now = time.perf_counter()
        stall = self._stall_seconds + now - start_time
        total = now - self._start_time
        return SaveStats(
            self._step,
            stall,
            total,
            sum(digest.bytes for digest in digests),
            max(copy for _, _, copy in reports),
        )

    def _run_on_rank_0(self, action: Callable[[], object]) -> None:
        """Run an action on rank 0; if it fails, every rank raises, so that none waits for another.

        Raises:
            SaveError: On every rank, if the action failed.
        """
        problem = ""
        if self._layout.rank == 0:
            try:
                action()
            except OSError as error:
                problem = os_error_message(error)

        problem = mesh.broadcast_object(problem, self._layout)
        if problem:
            self._raise_save_error(problem)

    def _raise_save_error(self, problem: str) -> None:
        """Discard the pending save and raise, with the free disk space as rank 0 sees it."""
        folder = folder_of(self._root, self._step)
        free_note = ""
        if self._layout.rank == 0:
            store.discard(self._root, self._step)
            with suppress(OSError):
                existing_folder = self._root if self._root.exists() else self._root.parent
                free_note = (
                    f", {shutil.disk_usage(existing_folder).free / 2**20:,.0f} MiB are free there"
                )

        raise SaveError(
            f"{folder} could not be written"
            f"{mesh.broadcast_object(free_note, self._layout)}: {problem}"
        )
