"""A data rank's batches, step after step, read ahead by a thread or by worker processes."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from bitlm_dist.config import Config
from bitlm_dist.data.ahead import Ahead
from bitlm_dist.data.feed import Feed
from bitlm_dist.data.leftovers import remove_leftovers
from bitlm_dist.data.mixed_feed import MixedFeed, training_feed
from bitlm_dist.data.mixture import Origin
from bitlm_dist.disks import check_shared_memory
from bitlm_dist.errors import UserError
from bitlm_dist.model.language_model import Batch
from bitlm_dist.processes import die_with

CPU = torch.device("cpu")
TENSORS = 2  # of a batch, [sequences, L]: tokens and documents
AHEAD = 2  # batches that each worker prepares


class Loader:
    """The share of every global batch that a data rank reads; see :class:`~bitlm_dist.data.ahead.Ahead` for the calls.

    Args:
        config: ``data.workers`` is the number of processes; 0: a thread of this one.
        feed: of the training split.
        begun: the step that comes first.
        first: global number of this rank's first sequence in it.
        count: sequences a step of this rank.
        stride: sequences a step of all ranks.
        device: where batches go.
    """

    def __init__(
        self, config: Config, feed: Feed | MixedFeed, *, begun: int, first: int, count: int, stride: int, device: torch.device
    ) -> None:
        self._steps = _Steps(config, feed.origin, begun, first, count, stride)
        self._device, self._workers = device, config.data.workers
        self._iterator: Iterator[Any] | None = None
        if self._workers:
            batch = TENSORS * 8 * config.data.sequence_length * count  # of int64
            check_shared_memory(self._workers * (AHEAD + 1) * batch, f"data.workers = {self._workers}")
            self._iterator, self._next = self._start(begun), begun
        else:
            self._steps.feed = feed
        self._ahead = Ahead(self._fetch)

    def _start(self, begun: int) -> Iterator[Any]:
        loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=_From(begun),
            num_workers=self._workers,
            prefetch_factor=AHEAD,
            multiprocessing_context="spawn",
            worker_init_fn=partial(_begin_worker, os.getpid()),
        )
        return iter(loader)

    def _fetch(self, step: int) -> Batch:
        if self._iterator is None:
            return self._steps[step].to(self._device)
        assert step == self._next, "workers read step after step"
        self._next += 1
        found = next(self._iterator)
        if isinstance(found, UserError):
            raise found
        assert isinstance(found, Batch)
        return found.to(self._device)

    def ask(self, step: int) -> None:
        """Begin the batch of a step, unless that is done."""
        self._ahead.ask(step)

    def wait(self) -> None:
        """Until the batch asked for is there.

        Raises:
            UserError: a shard is damaged.
        """
        self._ahead.wait()

    def take(self) -> Batch:
        """The batch asked for; begins the next one."""
        return self._ahead.take()

    def close(self) -> bool:
        """Let the read in flight end, and the workers -> whether it did."""
        ended = self._ahead.close()
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]
            remove_leftovers()  # one that ended too slowly was killed
        return ended


def _begin_worker(parent: int, number: int) -> None:
    die_with(parent)


class _From:
    """Steps from one on, without end."""

    def __init__(self, begun: int) -> None:
        self._begun = begun

    def __iter__(self) -> Iterator[int]:
        step = self._begun
        while True:
            yield step
            step += 1


class _Steps(Dataset[Any]):
    """Batches by step. A worker opens the shards itself, when the first is asked for."""

    def __init__(self, config: Config, origin: Origin, begun: int, first: int, count: int, stride: int) -> None:
        self._config, self._origin = config, origin
        self._begun, self._first, self._count, self._stride = begun, first, count, stride
        self.feed: Feed | MixedFeed | None = None

    def __getitem__(self, step: int) -> Any:
        in_worker = self.feed is None or torch.utils.data.get_worker_info() is not None
        try:
            if self.feed is None:
                self.feed = training_feed(self._config, self._origin)
            return self.feed.batch(self._first + (step - self._begun) * self._stride, self._count, CPU)
        except UserError as error:
            if in_worker:  # raised there it would come with a traceback
                return error
            raise
