"""Mixture of several prepared folders, read with the weights that `data.sources` gives them.

The sources and their weights may change when a run resumes, see
:mod:`bitlm_dist.training.data_resumption`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitlm_dist.config import Config
from bitlm_dist.data.config import SourceConfig
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.data.mixture import BEGINNING, Mixture, Origin
from bitlm_dist.data.packed_dataset import (
    PackedDataset,
    collate_sequences,
    few_sequences_warning,
)
from bitlm_dist.errors import UserError
from bitlm_dist.model.batch import Batch


class MixtureDataset:
    """Packed sequences of the training splits of several folders, with one global numbering.

    Args:
        datasets: sources by name.
        mixture: assignment of sequences to the sources, in the order of ``datasets``.
        origin: point of the run at which the mixture takes over.
        mixture_spec: description of the mixture for checkpoints, see :func:`_mixture_spec_of`.
    """

    def __init__(
        self,
        datasets: Mapping[str, PackedDataset],
        mixture: Mixture,
        origin: Origin,
        mixture_spec: list[Any],
    ) -> None:
        self._names = list(datasets)
        self._datasets = list(datasets.values())
        self._mixture = mixture
        self.origin = origin
        self.mixture_spec = mixture_spec

    def sequence(self, sequence_index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens and document ids [L] of sequence ``sequence_index`` of the run."""
        source, index_in_source = self._mixture.locate(sequence_index)
        return self._datasets[source].sequence(index_in_source)

    def batch(self, first: int, num_sequences: int, device: torch.device) -> Batch:
        """Return sequences ``first`` to ``first + num_sequences - 1`` as a batch."""
        return collate_sequences(self.sequence, first, num_sequences, device)

    def sequences_read(self, step: int, sequence: int) -> dict[str, int]:
        """Count the sequences that a run has read from each source before ``step``.

        Args:
            step: step that the run is about to start.
            sequence: global index of its first sequence.

        Returns:
            The counts by source key, including sources that left the mixture earlier.
        """
        return {
            **self.origin.taken,
            **dict(
                zip(
                    source_keys(self._datasets),
                    self._mixture.sequences_before(step).tolist(),
                    strict=True,
                )
            ),
        }

    @property
    def max_targets_per_sequence(self) -> int:
        """Bound of the target blocks of any sequence of any source."""
        return max(dataset.max_targets_per_sequence for dataset in self._datasets)

    def check_source_limits(self, num_steps: int) -> None:
        """Check that the sources suffice for a run of ``num_steps``.

        Raises:
            UserError: All sources reach their limits earlier.
        """
        self._mixture.sequences_before(max(num_steps, self.origin.step))

    def sequences_per_source(self, step: int) -> dict[str, int]:
        """Count the sequences that the steps before ``step`` took from each source."""
        return {
            f"sequences/{n}": int(c)
            for n, c in zip(self._names, self._mixture.sequences_before(step), strict=True)
        }

    def epochs(self, step: int, sequence: int) -> dict[str, float]:
        """Return :meth:`PackedDataset.epochs` of each source, under ``epochs/NAME``."""
        every = zip(self._names, self._datasets, self._mixture.sequences_before(step), strict=True)
        return {f"epochs/{name}": int(count) / len(dataset) for name, dataset, count in every}

    def predicted_fraction(self, step: int) -> float:
        """Average :meth:`PackedDataset.predicted_fraction` over the sequences before ``step``."""
        num_sequences = self._mixture.sequences_before(step)
        return sum(
            int(n) * dataset.predicted_fraction(step)
            for n, dataset in zip(num_sequences, self._datasets, strict=True)
        ) / int(num_sequences.sum())

    def fingerprint(self) -> dict[str, Any]:
        """Merge the fingerprints of the sources; fields of one source carry its name.

        See :meth:`PackedDataset.fingerprint`.
        """
        merged: dict[str, Any] = {}
        for name, dataset in zip(self._names, self._datasets, strict=True):
            merged |= {
                f"{key} of {name}" if is_per_source_field(key) else key: value
                for key, value in dataset.fingerprint().items()
            }
        return merged

    def summary(self) -> str:
        """Summarize all sources in one line."""
        since = f"mixture since step {self.origin.step}: " if self.origin != BEGINNING else ""
        return since + "; ".join(
            f"{name}: {dataset.summary()}"
            for name, dataset in zip(self._names, self._datasets, strict=True)
        )

    def warnings(self, sequences_per_step: int) -> list[str]:
        """Warnings about steps of this size, one line each."""
        return few_sequences_warning(sum(map(len, self._datasets)), sequences_per_step)

    def close(self) -> None:
        """Close the shards of all sources."""
        for dataset in self._datasets:
            dataset.close()


def training_dataset(config: Config, origin: Origin = BEGINNING) -> PackedDataset | MixtureDataset:
    """Open the training data of a run.

    Args:
        config: must have ``data.path``.
        origin: point of the run at which its sources take over from earlier ones.

    Raises:
        UserError: A folder is not ready, or the sources have different tokenizers.
    """
    assert config.data.path is not None
    if not config.data.sources and origin == BEGINNING:
        return PackedDataset.from_config(config, "train", config.data.shuffle)

    # After a mixture, data.path alone is a mixture of one source: it may have been read before.
    sources = config.data.sources or (SourceConfig(path=config.data.path, weight=1.0),)
    names = source_names([source.path for source in sources])
    datasets = {
        n: PackedDataset.from_folder(s.path, config, "train", config.data.shuffle)
        for n, s in zip(names, sources, strict=True)
    }
    _check_same_tokenizer(datasets, config.data.path)

    epochs = zip(datasets.values(), (source.max_epochs for source in sources), strict=True)
    limits = [
        None if max_epochs is None else int(max_epochs * len(dataset))
        for dataset, max_epochs in epochs
    ]

    keys = source_keys(list(datasets.values()))
    mixture = Mixture(
        [source.weight_points for source in sources],
        config.training.global_batch_tokens // config.data.sequence_length,
        config.training.seed,
        limits,
        first_step=origin.step,
        first_sequence=origin.sequence,
        sequences_read=[origin.taken.get(key, 0) for key in keys],
    )
    return MixtureDataset(datasets, mixture, origin, _mixture_spec_of(config, keys, limits))


def _check_same_tokenizer(datasets: Mapping[str, PackedDataset], path: Path) -> None:
    """Check that all sources have the tokenizer of ``data.path``, which supplies the codes."""
    tokenizer = read_manifest(path)["tokenizer"]["fingerprint"]
    for name, dataset in datasets.items():
        if dataset.manifest["tokenizer"]["fingerprint"] != tokenizer:
            raise UserError(
                f"data.sources: {name} was prepared with another tokenizer than {path.name}: "
                "prepare both with the same"
            )


def source_keys(datasets: Sequence[PackedDataset]) -> list[str]:
    """Return a key for each source: the hash of its index, regardless of the folder's name.

    A folder that is listed several times gets a numbered key for each repetition.
    """
    index_hashes = [dataset.index_hash for dataset in datasets]
    return [
        key if not (num_earlier := index_hashes[:n].count(key)) else f"{key} {num_earlier + 1}"
        for n, key in enumerate(index_hashes)
    ]


def is_per_source_field(field: str) -> bool:
    """Return True if a field of a fingerprint describes the data of a single source."""
    return field.partition(" of ")[0] in {"data.index", "data.order"}


def _mixture_spec_of(
    config: Config, keys: Sequence[str], limits: Sequence[int | None]
) -> list[Any]:
    """List key, weight schedule and limit of each source; empty for ``data.path`` alone."""
    schedules = [[list(knot) for knot in source.weight_points] for source in config.data.sources]
    return (
        [list(source_spec) for source_spec in zip(keys, schedules, limits, strict=True)]
        if schedules
        else []
    )


def source_names(folders: Sequence[Path]) -> list[str]:
    """Name each source after its folder, with its position appended if the name is not unique."""
    folder_names = [folder.name for folder in folders]
    return [
        name if folder_names.count(name) == 1 else f"{name}-{number}"
        for number, name in enumerate(folder_names)
    ]
