"""Several prepared folders read as one, in the shares that `data.sources` gives them.

The sources and their shares may change when a run resumes, see :mod:`bitlm_dist.training.continuation`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitlm_dist.config import Config, SourceConfig
from bitlm_dist.data.feed import Feed, batch_of
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.data.mixture import BEGINNING, Mixture, Origin
from bitlm_dist.errors import UserError
from bitlm_dist.model.language_model import Batch


class MixedFeed:
    """Packed sequences of the training splits of several folders, numbered over all of them.

    Args:
        feeds: by name.
        mixture: of them, in this order.
        origin: where the mixture takes over.
        shares: what a checkpoint records of the mixture, see :func:`_shares_of`.
    """

    def __init__(self, feeds: Mapping[str, Feed], mixture: Mixture, origin: Origin, shares: list[Any]) -> None:
        self._names, self._feeds, self._mixture = list(feeds), list(feeds.values()), mixture
        self.origin, self.shares = origin, shares

    def sequence(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and document ids [L] of sequence ``number`` of the run."""
        source, place = self._mixture.place(number)
        return self._feeds[source].sequence(place)

    def batch(self, first: int, count: int, device: torch.device) -> Batch:
        """Sequences first..first+count-1."""
        return batch_of(self.sequence, first, count, device)

    def taken(self, step: int, sequence: int) -> dict[str, int]:
        """Sequences of each source that a run which begins step ``step`` with sequence ``sequence`` has read, by key."""
        return {**self.origin.taken, **dict(zip(keys_of(self._feeds), self._mixture.before(step).tolist(), strict=True))}

    def check_steps(self, steps: int) -> None:
        """Compare the sources' limits with what a run needs.

        Raises:
            UserError: there is not enough for all ``steps``.
        """
        self._mixture.before(max(steps, self.origin.step))

    def counts(self, step: int) -> dict[str, int]:
        """Sequences that the steps before ``step`` took from each source."""
        return {f"sequences/{n}": int(c) for n, c in zip(self._names, self._mixture.before(step), strict=True)}

    def epochs(self, step: int, sequence: int) -> dict[str, float]:
        """As :meth:`Feed.epochs`, of each source, under ``epochs/NAME``."""
        every = zip(self._names, self._feeds, self._mixture.before(step), strict=True)
        return {f"epochs/{name}": int(count) / len(feed) for name, feed, count in every}

    def predicted_share(self, step: int) -> float:
        """As :meth:`Feed.predicted_share`, over the sequences that the steps before ``step`` take from each source."""
        taken = self._mixture.before(step)
        return sum(int(n) * feed.predicted_share(step) for n, feed in zip(taken, self._feeds, strict=True)) / int(taken.sum())

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`Feed.fingerprint`; what belongs to one source has its name."""
        found: dict[str, Any] = {}
        for name, feed in zip(self._names, self._feeds, strict=True):
            found |= {f"{key} of {name}" if of_one_source(key) else key: value for key, value in feed.fingerprint().items()}
        return found

    def summary(self) -> str:
        """One line about what is read."""
        since = f"mixture since step {self.origin.step}: " if self.origin != BEGINNING else ""
        return since + "; ".join(f"{name}: {feed.summary()}" for name, feed in zip(self._names, self._feeds, strict=True))

    def close(self) -> None:
        """Let go of the shards."""
        for feed in self._feeds:
            feed.close()


def training_feed(config: Config, origin: Origin = BEGINNING) -> Feed | MixedFeed:
    """What a run trains on.

    Args:
        config: ``data.path`` is set.
        origin: where its sources take over from others.

    Raises:
        UserError: a folder is not ready, or sources have different tokenizers.
    """
    assert config.data.path is not None
    if not config.data.sources and origin == BEGINNING:
        return Feed.of_config(config, "train", config.data.shuffle)

    sources = config.data.sources or (SourceConfig(path=config.data.path, weight=1.0),)
    names = names_of([source.path for source in sources])
    feeds = {n: Feed.of_folder(s.path, config, "train", config.data.shuffle) for n, s in zip(names, sources, strict=True)}
    tokenizer = read_manifest(config.data.path)["tokenizer"]["fingerprint"]
    for name, feed in feeds.items():
        if feed.manifest["tokenizer"]["fingerprint"] != tokenizer:
            raise UserError(
                f"data.sources: {name} was prepared with another tokenizer than {config.data.path.name}: prepare both with the same"
            )

    epochs = zip(feeds.values(), (source.max_epochs for source in sources), strict=True)
    limits = [None if most is None else int(most * len(feed)) for feed, most in epochs]
    keys = keys_of(list(feeds.values()))
    mixture = Mixture(
        [source.knots for source in sources],
        config.training.global_batch_tokens // config.data.sequence_length,
        config.training.seed,
        limits,
        step=origin.step,
        sequence=origin.sequence,
        taken=[origin.taken.get(key, 0) for key in keys],
    )
    return MixedFeed(feeds, mixture, origin, _shares_of(config, keys, limits))


def keys_of(feeds: Sequence[Feed]) -> list[str]:
    """What a source is known by while a run lasts: the hash of its index, whatever its folder is called."""
    indices = [feed.index for feed in feeds]
    return [key if not (again := indices[:n].count(key)) else f"{key} {again + 1}" for n, key in enumerate(indices)]


def of_one_source(field: str) -> bool:
    """Whether a field of a fingerprint describes one source's data."""
    return field.partition(" of ")[0] in {"data.index", "data.order"}


def _shares_of(config: Config, keys: Sequence[str], limits: Sequence[int | None]) -> list[Any]:
    """Key, weights by step and limit of each source; empty for ``data.path`` alone."""
    knots = [[list(knot) for knot in source.knots] for source in config.data.sources]
    return [list(share) for share in zip(keys, knots, limits, strict=True)] if knots else []


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own where it has it alone."""
    own = [folder.name for folder in folders]
    return [name if own.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(own)]
