"""Data loading for one data-parallel rank, prefetched by a thread or by worker processes."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from bitlm_dist.config import Config
from bitlm_dist.data.mixture import Origin
from bitlm_dist.data.mixture_dataset import MixtureDataset, training_dataset
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.data.prefetch import Prefetcher
from bitlm_dist.data.stale_resources import remove_stale_resources
from bitlm_dist.disks import check_shared_memory
from bitlm_dist.errors import UserError
from bitlm_dist.model.batch import Batch, TargetFinder
from bitlm_dist.processes import die_with_parent

CPU = torch.device("cpu")
BYTES_PER_TOKEN = 42  # of a batch, at most: int64 tokens, document ids, and the index of targets
PREFETCH_FACTOR = 2  # batches prepared ahead per worker


class Loader:
    """Loads the slice of each global batch that belongs to one data-parallel rank.

    The methods are those of :class:`~bitlm_dist.data.prefetch.Prefetcher`.

    Args:
        config: ``data.workers`` is the number of worker processes. With 0, a thread of this process
            reads the batches.
        finder: finds what carries loss, where the batches are read.
        dataset: training split.
        start_step: first step to load.
        first_sequence: global index of this rank's first sequence in ``start_step``.
        num_sequences: sequences per step of this rank.
        stride: sequences per step of all ranks together.
        device: device on which batches are placed.
    """

    def __init__(
        self,
        config: Config,
        dataset: PackedDataset | MixtureDataset,
        finder: TargetFinder,
        *,
        start_step: int,
        first_sequence: int,
        num_sequences: int,
        stride: int,
        device: torch.device,
    ) -> None:
        self._step_dataset = _StepDataset(
            config, dataset.origin, finder, start_step, first_sequence, num_sequences, stride
        )
        self._device = device
        self._num_workers = config.data.workers
        self._iterator: Iterator[Any] | None = None

        if self._num_workers:
            # Workers hand over batches in shared memory, and die of a bus error where it is full.
            batch_bytes = BYTES_PER_TOKEN * config.data.sequence_length * num_sequences
            check_shared_memory(
                self._num_workers * (PREFETCH_FACTOR + 1) * batch_bytes,
                f"data.workers = {self._num_workers}",
            )
            self._iterator = self._start_workers(start_step)
            self._next_step = start_step
        else:
            self._step_dataset.dataset = dataset

        self._prefetcher = Prefetcher(self._fetch)

    def _start_workers(self, start_step: int) -> Iterator[Any]:
        # "spawn": a forked worker would inherit CUDA and the communicators of this process.
        loader = DataLoader(
            self._step_dataset,
            batch_size=None,
            sampler=_StepSampler(start_step),
            num_workers=self._num_workers,
            prefetch_factor=PREFETCH_FACTOR,
            multiprocessing_context="spawn",
            worker_init_fn=partial(_init_worker, os.getpid()),
        )
        return iter(loader)

    def _fetch(self, step: int) -> Batch:
        if self._iterator is None:
            return self._step_dataset[step].to(self._device)

        assert step == self._next_step, "workers read steps in order"
        self._next_step += 1
        batch = next(self._iterator)

        # A worker returns its UserError instead of raising it, see _StepDataset.
        if isinstance(batch, UserError):
            raise batch
        assert isinstance(batch, Batch)
        return batch.to(self._device)

    def start(self, step: int) -> None:
        """Start loading the batch of a step. A no-op if it has been started already."""
        self._prefetcher.start(step)

    def wait(self) -> None:
        """Wait for the batch that was started.

        Raises:
            UserError: A shard is damaged.
        """
        self._prefetcher.wait()

    def get(self) -> Batch:
        """Return the batch that was started, and start loading the next one."""
        return self._prefetcher.get()

    def close(self) -> bool:
        """Wait for the pending read and stop the workers.

        Returns:
            True if the read finished in time.
        """
        ended = self._prefetcher.close()
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]
            # A worker that is too slow to stop is killed and cannot clean up after itself.
            remove_stale_resources()
        return ended


def _init_worker(parent_pid: int, worker_id: int) -> None:
    die_with_parent(parent_pid)


class _StepSampler:
    """Infinite sampler of consecutive steps."""

    def __init__(self, start_step: int) -> None:
        self._start_step = start_step

    def __iter__(self) -> Iterator[int]:
        step = self._start_step
        while True:
            yield step
            step += 1


class _StepDataset(Dataset[Any]):
    """Map-style dataset from step to batch. Each worker opens the shards on its first access."""

    def __init__(
        self,
        config: Config,
        origin: Origin,
        finder: TargetFinder,
        start_step: int,
        first_sequence: int,
        num_sequences: int,
        stride: int,
    ) -> None:
        self._config = config
        self._origin = origin
        self._finder = finder
        self._start_step = start_step
        self._first_sequence = first_sequence
        self._num_sequences = num_sequences
        self._stride = stride
        self.dataset: PackedDataset | MixtureDataset | None = None

    def __getitem__(self, step: int) -> Any:
        in_worker = self.dataset is None or torch.utils.data.get_worker_info() is not None
        try:
            if self.dataset is None:
                self.dataset = training_dataset(self._config, self._origin)
            batch = self.dataset.batch(
                self._first_sequence + (step - self._start_step) * self._stride,
                self._num_sequences,
                CPU,
            )
            return self._finder.find_all(batch)
        except UserError as error:
            # Raised in a worker, DataLoader would wrap it together with a traceback.
            if in_worker:
                return error
            raise
