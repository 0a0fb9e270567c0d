"""Several prepared folders read as one, in the shares that `data.sources` gives them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitlm_dist.config import Config
from bitlm_dist.data.feed import Feed, batch_of
from bitlm_dist.data.mixture import Mixture
from bitlm_dist.errors import UserError
from bitlm_dist.model.language_model import Batch


class MixedFeed:
    """Packed sequences of the training splits of several folders, numbered over all of them.

    Args:
        feeds: by name.
        mixture: of them, in this order.
    """

    def __init__(self, feeds: Mapping[str, Feed], mixture: Mixture) -> None:
        self._names, self._feeds, self._mixture = list(feeds), list(feeds.values()), mixture

    def sequence(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and document ids [L] of sequence ``number`` of the run."""
        source, place = self._mixture.place(number)
        return self._feeds[source].sequence(place)

    def batch(self, first: int, count: int, device: torch.device) -> Batch:
        """Sequences first..first+count-1."""
        return batch_of(self.sequence, first, count, device)

    def counts(self, step: int) -> dict[str, int]:
        """Sequences that the steps before ``step`` took from each source."""
        return {f"sequences/{n}": int(c) for n, c in zip(self._names, self._mixture.before(step), strict=True)}

    def epochs(self, sequences: int) -> dict[str, float]:
        """As :meth:`Feed.epochs`, of each source, under ``epochs/NAME``; ``sequences`` are those of whole steps."""
        taken = self._mixture.before(sequences // self._mixture.per_step)
        every = zip(self._names, self._feeds, taken, strict=True)
        return {f"epochs/{name}": int(count) / len(feed) for name, feed, count in every}

    def predicted_share(self, step: int) -> float:
        """As :meth:`Feed.predicted_share`, over the sequences that the steps before ``step`` take from each source."""
        taken = self._mixture.before(step)
        return sum(int(n) * feed.predicted_share(step) for n, feed in zip(taken, self._feeds, strict=True)) / int(taken.sum())

    def fingerprint(self) -> dict[str, Any]:
        """See :meth:`Feed.fingerprint`; what belongs to one source has its name."""
        found: dict[str, Any] = {}
        for name, feed in zip(self._names, self._feeds, strict=True):
            own = {"data.index", "data.order"}
            found |= {f"{key} of {name}" if key in own else key: value for key, value in feed.fingerprint().items()}
        return found

    def summary(self) -> str:
        """One line about what is read."""
        return "; ".join(f"{name}: {feed.summary()}" for name, feed in zip(self._names, self._feeds, strict=True))

    def close(self) -> None:
        """Let go of the shards."""
        for feed in self._feeds:
            feed.close()


def training_feed(config: Config) -> Feed | MixedFeed:
    """What a run trains on.

    Raises:
        UserError: a folder is not ready, sources have different tokenizers, or there is not enough of them for all steps.
    """
    sources = config.data.sources
    if not sources:
        return Feed.of_config(config, "train", config.data.shuffle)
    names = names_of([source.path for source in sources])
    feeds = {n: Feed.of_folder(s.path, config, "train", config.data.shuffle) for n, s in zip(names, sources, strict=True)}
    first, *others = names
    for name in others:
        if feeds[name].manifest["tokenizer"]["fingerprint"] != feeds[first].manifest["tokenizer"]["fingerprint"]:
            raise UserError(f"data.sources: {name} was prepared with another tokenizer than {first}: prepare both with the same")
    epochs = zip(feeds.values(), (source.max_epochs for source in sources), strict=True)
    limits = [None if most is None else int(most * len(feed)) for feed, most in epochs]
    per_step = config.training.global_batch_tokens // config.data.sequence_length
    mixture = Mixture([source.knots for source in sources], per_step, config.training.seed, limits)
    mixture.before(config.training.steps)
    return MixedFeed(feeds, mixture)


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own where it has it alone."""
    own = [folder.name for folder in folders]
    return [name if own.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(own)]
