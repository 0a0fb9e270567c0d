"""Packed sequences by index: the same on any parallel layout and after any restart."""

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
from bitlm_dist.data.packing import PackingPlan, assemble_sequence, max_targets_per_sequence, pack
from bitlm_dist.data.shards import DocumentShards
from bitlm_dist.formatting import format_percent, plural
from bitlm_dist.model.batch import Batch


def collate_sequences(
    get_sequence: Callable[[int], tuple[NDArray[np.int64], NDArray[np.int64]]],
    first: int,
    num_sequences: int,
    device: torch.device,
) -> Batch:
    """Collate sequences ``first`` to ``first + num_sequences - 1`` into a batch.

    Args:
        get_sequence: function from a sequence index to tokens and document ids, both [L].
        first: index of the first sequence.
        num_sequences: number of sequences.
        device: device on which the batch is placed.
    """
    pairs = [get_sequence(first + i) for i in range(num_sequences)]
    tokens, ids = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*pairs, strict=True))
    return Batch(tokens, ids, torch.arange(first, first + num_sequences, device=device))


def few_sequences_warning(sequences_per_epoch: int, sequences_per_step: int) -> list[str]:
    """A warning, if every step reads all of the text; else nothing."""
    if sequences_per_epoch > sequences_per_step:
        return []
    return [
        f"an epoch has {plural(sequences_per_epoch, 'sequence')} and a step takes "
        f"{sequences_per_step:,}, so every step reads all of the text: prepare more text, or "
        "lower data.sequence_length or training.global_batch_tokens"
    ]


class PackedDataset:
    """Packed sequences of one split, numbered across epochs.

    Args:
        folder: prepared folder, the output of `bitlm prep`.
        split: ``train`` or ``validation``.
        block_size: m, tokens per block.
        sequence_length: L, tokens per sequence.
        seed: seed of the shuffling.
        shuffle: shuffle the documents anew for each epoch. If False, read them in stored order.
        packer: see :func:`~bitlm_dist.data.packing.pack`.
        cache: see :class:`~bitlm_dist.data.shards.DocumentShards`.
        cache_limit: see :class:`~bitlm_dist.data.shards.DocumentShards`.
    """

    # The interface that MixtureDataset shares; a single source has no mixture.
    origin = BEGINNING
    mixture_spec: ClassVar[list[Any]] = []

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        block_size: int,
        sequence_length: int,
        seed: int = 0,
        shuffle: bool = False,
        packer: str = "greedy",
        cache: Path | None = None,
        cache_limit: str | None = None,
    ) -> None:
        self.manifest = read_manifest(folder)
        self._shards = DocumentShards(folder, split, cache, seed, cache_limit)
        self._split = split
        self._shuffle = shuffle
        self._seed = seed
        self._block_size = block_size
        self._sequence_length = sequence_length
        self._packer = packer

        # Global index of the first sequence of each epoch, for the epochs planned so far.
        self._epoch_starts = [0]

        # Two plans, as a batch at the end of an epoch reaches into the next one.
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._get_tokens = lru_cache(maxsize=64)(self._shards.tokens)

    @classmethod
    def from_config(cls, config: Config, split: str, shuffle: bool = False) -> "PackedDataset":
        """Open the dataset of ``data.path``, which must be set.

        Training passes ``data.shuffle``; evaluation reads documents in stored order.
        """
        assert config.data.path is not None
        return cls.from_folder(config.data.path, config, split, shuffle)

    @classmethod
    def from_folder(
        cls, folder: Path, config: Config, split: str, shuffle: bool
    ) -> "PackedDataset":
        """Open the dataset of one folder, packed as configured."""
        return cls(
            folder,
            split,
            block_size=config.model.block_size,
            sequence_length=config.data.sequence_length,
            seed=config.training.seed,
            shuffle=shuffle,
            packer=config.data.packing,
            cache=config.data.cache,
            cache_limit=config.data.cache_limit,
        )

    def _make_plan(self, epoch: int) -> PackingPlan:
        lengths = self._shards.document_lengths
        order = self._shards.epoch_order(epoch) if self._shuffle else np.arange(len(lengths))
        return pack(
            lengths,
            order,
            block_size=self._block_size,
            sequence_length=self._sequence_length,
            packer=self._packer,
        )

    def __len__(self) -> int:
        """Return the number of sequences of the first epoch."""
        return self._num_sequences

    @cached_property
    def _num_sequences(self) -> int:
        # Cached separately, as the plan of epoch 0 is evicted once later epochs are read.
        return len(self._plan(0))

    def _locate(self, sequence_index: int) -> tuple[int, int]:
        """Return the epoch of a sequence and its index within that epoch."""
        while self._epoch_starts[-1] <= sequence_index:
            self._epoch_starts.append(
                self._epoch_starts[-1] + len(self._plan(len(self._epoch_starts) - 1))
            )
        epoch = int(np.searchsorted(self._epoch_starts, sequence_index, side="right")) - 1
        return epoch, sequence_index - self._epoch_starts[epoch]

    def sequence(self, sequence_index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens and document ids [L] of global sequence ``sequence_index``."""
        epoch, index_in_epoch = self._locate(sequence_index)
        return assemble_sequence(
            self._plan(epoch).spans_of_sequence(index_in_epoch),
            self._get_tokens,
            block_size=self._block_size,
            sequence_length=self._sequence_length,
            bos=self.manifest["bos"],
            eos=self.manifest["eos"],
        )

    def batch(self, first: int, num_sequences: int, device: torch.device) -> Batch:
        """Return sequences ``first`` to ``first + num_sequences - 1`` as a batch."""
        return collate_sequences(self.sequence, first, num_sequences, device)

    @property
    def index_hash(self) -> str:
        """Hash of the split's index, which does not depend on the folder's location."""
        return self._shards.fingerprint

    def sequences_read(self, step: int, sequence: int) -> dict[str, int]:
        """Count the sequences that a run has read before ``step``, by source key.

        Args:
            step: step that the run is about to start.
            sequence: global index of its first sequence.
        """
        return {self.index_hash: sequence}

    def check_source_limits(self, num_steps: int) -> None:
        """Do nothing: a single source has no limit."""

    def sequences_per_source(self, step: int) -> dict[str, int]:
        """Return an empty dictionary: only mixtures count sequences per source."""
        return {}

    def epochs(self, step: int, sequence: int) -> dict[str, float]:
        """Count the epochs that were read before ``step``, in lengths of the first epoch.

        Args:
            step: step that the run is about to start.
            sequence: global index of its first sequence.

        Returns:
            The number of epochs, under its key in metrics.jsonl.
        """
        return {"epochs": sequence / len(self)}

    @cached_property
    def max_targets_per_sequence(self) -> int:
        """Bound of the target blocks of any sequence of any epoch."""
        return max_targets_per_sequence(
            self._shards.document_lengths,
            self._block_size,
            self._sequence_length // self._block_size,
        )

    @property
    def num_predicted_tokens(self) -> int:
        """Tokens per epoch that carry loss: all tokens and the first EOS of each document."""
        return int(self._shards.document_lengths.sum()) + len(self._shards.document_lengths)

    def predicted_fraction(self, step: int) -> float:
        """Return the fraction of an epoch's positions that hold predicted tokens.

        The others hold BOS, EOS padding, repeated blocks and padding.
        """
        return self.num_predicted_tokens / (len(self) * self._sequence_length)

    def summary(self) -> str:
        """Summarize the size of the dataset and the cost of packing in one line."""
        padding, repeated, cut = (format_percent(fraction) for fraction in self._plan(0).stats)
        text_bytes = self.manifest["splits"][self._split]["bytes"]
        return (
            f"{plural(len(self), 'sequence')} per epoch: "
            f"{len(self) * self._sequence_length:,} positions, "
            f"of which {self.num_predicted_tokens:,} are predicted tokens "
            f"({plural(text_bytes, 'byte')} of text); {self._packer}: {padding} padding, "
            f"{repeated} repeated, {cut} of the documents cut"
        )

    def warnings(self, sequences_per_step: int) -> list[str]:
        """Warnings about steps of this size, one line each."""
        return few_sequences_warning(len(self), sequences_per_step)

    def epoch_batches(
        self, batch_size: int, max_sequences: int, device: torch.device
    ) -> Iterator[Batch]:
        """Yield the first epoch in batches.

        Args:
            batch_size: sequences per batch; the last batch may be smaller.
            max_sequences: maximum total number of sequences; 0: unlimited.
            device: device on which batches are placed.
        """
        total = min(len(self), max_sequences) if max_sequences else len(self)
        for first in range(0, total, batch_size):
            yield self.batch(first, min(batch_size, total - first), device)

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings that determine the sequence at each index.

        They are stored in checkpoints, and a resumed run must have the same ones.
        """
        return {
            "data.index": self.index_hash,
            "data.tokenizer": self.manifest["tokenizer"]["fingerprint"],
            "data.sequence_length": self._sequence_length,
            "data.packing": self._packer,
            "data.shuffle": self._shuffle,
            # Without shuffling, the order is that of the index.
            **(
                {f"data.{name}": value for name, value in self._shards.order_fingerprint().items()}
                if self._shuffle
                else {}
            ),
            "model.block_size": self._block_size,
            "training.seed": self._seed,
        }

    def close(self) -> None:
        """Close the shards."""
        self._shards.close()
