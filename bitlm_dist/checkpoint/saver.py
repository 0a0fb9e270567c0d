"""Checkpoints written while training goes on, at most one at a time.

Every rank copies what it is to write into host memory and goes on; a thread of its own writes, hashes and flushes its file. Threads
talk to no other rank: the ranks agree between two steps that all files are there, and rank 0 completes the folder.
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

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.checkpoint.store import SaveError
from bitlm_dist.checkpoint.tensors import NAMES, Entry, Written
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.parallel.sliced import Sliced

log = logging.getLogger(__name__)
ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was completed: how long training stood still for it and how long it took on the first rank.

    ``bytes`` are those of all ranks' files, ``copy_bytes`` the host memory that a rank's copy takes, at most.
    """

    step: int
    stall_seconds: float
    total_seconds: float
    bytes: int
    copy_bytes: int


class _Writer(Thread):
    """Writes one file; ``found`` is what it wrote, ``problem`` why it could not."""

    def __init__(self, file: Path, entries: Sequence[Entry], tensors: Sequence[Tensor]) -> None:
        super().__init__(daemon=True, name="checkpoint")  # one that is not completed is no loss
        self._file, self._entries, self._tensors = file, entries, tensors
        self.found: Written | None = None
        self.problem = ""

    def run(self) -> None:
        try:
            self.found = tensor_files.write(self._file, self._entries, self._tensors)
        except Exception as error:
            self.problem = str(error) or type(error).__name__


class _Copy:
    """Host memory for some slices, in one piece."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        ends = [0]
        for entry in entries:
            ends.append(ends[-1] + -(-entry.bytes // ALIGNMENT) * ALIGNMENT)
        self._memory = torch.empty(ends[-1], dtype=torch.uint8)
        if mesh.device().type == "cuda" and ends[-1]:
            _pin(self._memory)
        parts = ((self._memory[a : a + e.bytes], e) for a, e in zip(ends, entries, strict=False))
        self.tensors = [part.view(NAMES[entry.dtype]).view(entry.size) for part, entry in parts]

    @property
    def bytes(self) -> int:
        return len(self._memory)

    def take(self, tensors: Sequence[Tensor]) -> None:
        for own, tensor in zip(self.tensors, tensors, strict=True):
            own.copy_(tensor, non_blocking=True)
        if mesh.device().type == "cuda":
            torch.cuda.current_stream().synchronize()


def _pin(memory: Tensor) -> None:
    """Lock host memory for fast copies from the GPU; where that is not allowed, say so and go on without.

    torch's own pinned memory comes in powers of two, up to twice as much as is needed.
    """
    cudart = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(memory.data_ptr(), len(memory), 0))
    if code == 0:
        weakref.finalize(memory.untyped_storage(), cudart.cudaHostUnregister, memory.data_ptr())
        return

    log.warning("%.1f GiB of host memory could not be locked (CUDA error %d): saves take longer", len(memory) / 2**30, code)
    # CUDA keeps the error for the next check of a launch, which would report it as that launch's.
    with suppress(RuntimeError):
        torch.zeros(1, device=mesh.device())


class Saver:
    """Saves checkpoints of one run; every process of the job makes one and calls the same methods in the same order.

    Host memory: what this rank writes, once, kept from save to save (:attr:`bytes`). What several ranks hold, one of them writes.

    Args:
        root: the run's ``checkpoints`` folder.
        layout: of the job.
    """

    def __init__(self, root: Path, layout: Layout) -> None:
        self._root, self._layout = root, layout
        self._shares: list[list[Entry]] | None = None  # what each rank writes; the same in every save of a job
        self._copy: _Copy | None = None
        self._writer: _Writer | None = None
        self._step, self._state = 0, dict[str, Any]()
        self._began = self._stall = 0.0

    @property
    def bytes(self) -> int:
        """Host memory that copies of this rank's share take."""
        return 0 if self._copy is None else self._copy.bytes

    @property
    def pending(self) -> bool:
        """Whether a save was begun that :meth:`finish` has not completed."""
        return self._writer is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's file of it is still being written."""
        return self._writer is not None and self._writer.is_alive()

    def begin(self, step: int, tensors: Mapping[str, Sliced], state: Mapping[str, Any], began: float | None = None) -> None:
        """Copy what a checkpoint holds and start writing it; the caller may change the tensors as soon as this returns.

        Args:
            tensors: what this rank holds, by name.
            state: JSON values.
            began: when the caller began to collect all this, by ``time.perf_counter``; default: now.

        Raises:
            SaveError: on every rank, if the folder could not be made.
        """
        assert not self.pending, "finish the save before this one"
        self._began, self._step, self._state = time.perf_counter() if began is None else began, step, dict(state)
        held = tensor_files.entries_of(tensors)
        if self._shares is None:
            self._shares = tensor_files.share_out(mesh.from_all(list(held), self._layout))
        mine = self._shares[self._layout.rank]
        self._on_first(lambda: store.begin(self._root, step))
        file = store.building_of(self._root, step) / store.file_of(self._layout.rank)
        try:
            self._copy = self._copy or _Copy(mine)
            self._copy.take([held[entry] for entry in mine])
            self._writer = _Writer(file, mine, self._copy.tensors)
            self._writer.start()
        except (RuntimeError, MemoryError) as error:  # no memory: this save fails, on all ranks
            self._writer = _Writer(file, [], [])
            self._writer.problem = str(error)
        self._stall = time.perf_counter() - self._began

    def finish(self) -> Saved:
        """Wait until every rank's file is written, and complete the checkpoint.

        Raises:
            SaveError: on every rank, if one could not write; the checkpoints before it are as they were.
        """
        assert self._writer is not None
        assert self._shares is not None
        began = time.perf_counter()
        if self._writer.ident is not None:
            self._writer.join()
        reports = mesh.from_all((self._writer.found, self._writer.problem, self.bytes), self._layout)
        self._writer = None
        problems = [f"rank {rank}: {problem}" for rank, (_, problem, _) in enumerate(reports) if problem]
        if problems:
            self._fail(problems[0] if self._layout.world > 1 else problems[0].partition(": ")[2])
        written, shares = [found for found, _, _ in reports], self._shares
        self._on_first(lambda: store.complete(self._root, self._step, self._state, shares, written))
        now = time.perf_counter()
        stall, total = self._stall + now - began, now - self._began
        return Saved(self._step, stall, total, sum(found.bytes for found in written), max(copy for _, _, copy in reports))

    def _on_first(self, action: Callable[[], object]) -> None:
        """Rank 0 does it; where that fails every rank raises, so that none waits for the others."""
        problem = ""
        if self._layout.rank == 0:
            try:
                action()
            except OSError as error:
                problem = str(error)
        problem = mesh.from_first(problem, self._layout)
        if problem:
            self._fail(problem)

    def _fail(self, problem: str) -> None:
        folder, free = store.folder_of(self._root, self._step), ""
        if self._layout.rank == 0:
            store.abandon(self._root, self._step)
            with suppress(OSError):
                place = self._root if self._root.exists() else self._root.parent
                free = f", {shutil.disk_usage(place).free / 2**20:,.0f} MiB are free there"
        raise SaveError(f"{folder} could not be written{mesh.from_first(free, self._layout)}: {problem}")
