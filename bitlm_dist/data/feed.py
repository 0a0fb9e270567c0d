"""Batches as a function of the position: sequence number s of a run is the same on any layout and after any restart."""

from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from bitlm_dist.config import Config
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.data.mixture import BEGINNING
from bitlm_dist.data.packing import Plan, assemble, pack
from bitlm_dist.data.shards import Shards
from bitlm_dist.model.language_model import Batch


def batch_of(
    sequence: Callable[[int], tuple[NDArray[np.int64], NDArray[np.int64]]], first: int, count: int, device: torch.device
) -> Batch:
    """Sequences first..first+count-1 by what gives one."""
    pairs = [sequence(first + i) for i in range(count)]
    tokens, ids = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*pairs, strict=True))
    return Batch(tokens, ids, torch.arange(first, first + count, device=device))


class Feed:
    """Packed sequences of one split, numbered across epochs.

    Args:
        folder: what `bitlm prep` wrote.
        split: ``train`` (documents shuffled anew each epoch if ``shuffle``) or ``validation``.
        block, sequence_length: m and L.
        seed: of the order.
        shuffle: False reads documents as they lie.
        packer: see :func:`~bitlm_dist.data.packing.pack`.
        cache, cache_limit: see :class:`~bitlm_dist.data.shards.Shards`.
    """

    origin = BEGINNING  # a single source has no mixture: see MixedFeed
    shares: ClassVar[list[Any]] = []

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        block: int,
        sequence_length: int,
        seed: int = 0,
        shuffle: bool = False,
        packer: str = "greedy",
        cache: Path | None = None,
        cache_limit: str | None = None,
    ) -> None:
        self.manifest = read_manifest(folder)
        self._shards = Shards(folder, split, cache, seed, cache_limit)
        self._split, self._shuffle, self._seed = split, shuffle, seed
        self._block, self._length, self._packer = block, sequence_length, packer
        self._starts = [0]  # global number of each epoch's first sequence, as far as known
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._read = lru_cache(maxsize=64)(self._shards.tokens)

    @classmethod
    def of_config(cls, config: Config, split: str, shuffle: bool = False) -> "Feed":
        """The feed of a config whose ``data.path`` is set; training passes ``data.shuffle``, evaluation reads as documents lie."""
        assert config.data.path is not None
        return cls.of_folder(config.data.path, config, split, shuffle)

    @classmethod
    def of_folder(cls, folder: Path, config: Config, split: str, shuffle: bool) -> "Feed":
        """The feed of one folder, as a config wants it packed."""
        return cls(
            folder,
            split,
            block=config.model.block_size,
            sequence_length=config.data.sequence_length,
            seed=config.training.seed,
            shuffle=shuffle,
            packer=config.data.packing,
            cache=config.data.cache,
            cache_limit=config.data.cache_limit,
        )

    def _make_plan(self, epoch: int) -> Plan:
        lengths = self._shards.lengths
        order = self._shards.order(epoch) if self._shuffle else np.arange(len(lengths))
        return pack(lengths, order, block=self._block, sequence_length=self._length, packer=self._packer)

    def __len__(self) -> int:
        """Sequences of the first epoch."""
        return self._per_epoch

    @cached_property
    def _per_epoch(self) -> int:
        return len(self._plan(0))  # which is not kept once later epochs are read

    def _locate(self, number: int) -> tuple[int, int]:
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + len(self._plan(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return epoch, number - self._starts[epoch]

    def sequence(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and document ids [L] of global sequence ``number``."""
        epoch, place = self._locate(number)
        return assemble(
            self._plan(epoch).of(place),
            self._read,
            block=self._block,
            sequence_length=self._length,
            bos=self.manifest["bos"],
            eos=self.manifest["eos"],
        )

    def batch(self, first: int, count: int, device: torch.device) -> Batch:
        """Sequences first..first+count-1."""
        return batch_of(self.sequence, first, count, device)

    @property
    def index(self) -> str:
        """Hash of the split's index, which is the same wherever the folder lies."""
        return self._shards.fingerprint

    def taken(self, step: int, sequence: int) -> dict[str, int]:
        """See :meth:`MixedFeed.taken`."""
        return {self.index: sequence}

    def check_steps(self, steps: int) -> None:
        """A single source is read as often as it takes."""

    def counts(self, step: int) -> dict[str, int]:
        """Sequences of each source, where there are several."""
        return {}

    def epochs(self, step: int, sequence: int) -> dict[str, float]:
        """Epochs that were read before ``step``, whose first sequence is ``sequence``, in lengths of the first epoch.

        Returns:
            The number under its key of metrics.jsonl.
        """
        return {"epochs": sequence / len(self)}

    @property
    def predicted(self) -> int:
        """Tokens of an epoch that carry loss: every token of every document once, and each document's first EOS."""
        return int(self._shards.lengths.sum()) + len(self._shards.lengths)

    def predicted_share(self, step: int) -> float:
        """Share of an epoch's positions whose token is predicted; the others are BOS, EOS padding, repeated blocks and padding."""
        return self.predicted / (len(self) * self._length)

    def summary(self) -> str:
        """One line about what is read."""
        padding, repeated, cut = (f"{100 * share:.2g} %" for share in self._plan(0).waste)
        size = self.manifest["splits"][self._split]["bytes"]
        return (
            f"{len(self):,} sequences per epoch: {len(self) * self._length:,} positions, of which {self.predicted:,} are predicted "
            f"tokens ({size:,} bytes of text); {self._packer}: {padding} padding, {repeated} repeated, {cut} of the documents cut"
        )

    def epoch_batches(self, count: int, limit: int, device: torch.device) -> Iterator[Batch]:
        """The first epoch in batches of ``count`` sequences, at most ``limit`` sequences (0: all)."""
        total = min(len(self), limit) if limit else len(self)
        for first in range(0, total, count):
            yield self.batch(first, min(count, total - first), device)

    def fingerprint(self) -> dict[str, Any]:
        """What decides which sequence has which number; a resumed run must find the same."""
        return {
            "data.index": self.index,
            "data.tokenizer": self.manifest["tokenizer"]["fingerprint"],
            "data.sequence_length": self._length,
            "data.packing": self._packer,
            "data.shuffle": self._shuffle,
            **({f"data.{name}": value for name, value in self._shards.order_fingerprint().items()} if self._shuffle else {}),
            "model.block_size": self._block,
            "training.seed": self._seed,
        }

    def close(self) -> None:
        """Let go of the shards."""
        self._shards.close()
