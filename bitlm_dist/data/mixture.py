"""Which source each sequence of a run comes from: weights that may change over the steps, as a function of the sequence's number.

Every step's batch holds each source in its share, rounded up or down: one offset a step, drawn from (seed, step), decides which, so
that shares are right on average and no step strays by more than a sequence. Nothing depends on ranks or restarts.

Legend: K sources, B sequences a step, T steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitlm_dist.errors import UserError

CHUNK = 4096  # steps that are worked out at once
Knots = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Origin:
    """Where a mixture takes over within a run.

    Attributes:
        step: first step of the run that reads it.
        sequence: number of that step's first sequence.
        taken: sequences of each source that were read before, by the source's key. A source that left the mixture keeps its entry,
            so that it continues where it stopped if it comes back.
    """

    step: int = 0
    sequence: int = 0
    taken: Mapping[str, int] = field(default_factory=dict)


BEGINNING = Origin()


def weight_at(knots: Knots, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """A weight at each step: linear between the knots (step, weight), constant before the first and after the last."""
    at, weights = zip(*knots, strict=True)
    return np.interp(steps, at, weights)


def uniform(seed: int, *counters: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """Numbers in [0, 1) as a function of the seed and the counters alone (splitmix64's mixing, once a counter)."""
    with np.errstate(over="ignore"):
        state: Any = np.uint64(seed)
        for counter in counters:
            state = (state ^ np.asarray(counter).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return (np.asarray(state) >> np.uint64(11)).astype(np.float64) / 2.0**53


class Mixture:
    """Sources by sequence number.

    Args:
        weights: of each source, by step; at every step they add up to 1.
        per_step: B.
        seed: of the run.
        limits: sequences that a source has at most; None: any number. A source whose next step would go beyond it has no share from
            that step on, and the others have its share in proportion.
        step, sequence: of the run, where this mixture takes over.
        taken: sequences [K] of each source that were read before; they count towards its limit. None: none.
    """

    def __init__(
        self,
        weights: Sequence[Knots],
        per_step: int,
        seed: int,
        limits: Sequence[int | None],
        *,
        step: int = 0,
        sequence: int = 0,
        taken: Sequence[int] | None = None,
    ) -> None:
        self._weights, self.per_step, self._seed = weights, per_step, seed
        self._step, self._sequence = step, sequence
        self._limits = np.array([np.iinfo(np.int64).max if limit is None else limit for limit in limits])
        self._open = np.ones(len(weights), dtype=bool)  # sources that have not reached their limits, at the last step known
        # [T + 1, K] sequences of each source before each step, from the first one of this mixture on
        self._before = np.array([[0] * len(weights) if taken is None else taken], dtype=np.int64)
        self._order = lru_cache(maxsize=4)(self._make_order)

    def before(self, step: int) -> NDArray[np.int64]:
        """Sequences [K] that the steps before ``step``, which is one of this mixture's, take from each source.

        Raises:
            UserError: all sources have reached their limits before.
        """
        assert step >= self._step, "an earlier mixture read that step"
        while len(self._before) <= step - self._step:
            self._extend()
        return self._before[step - self._step]

    def _extend(self) -> None:
        first = self._step + len(self._before) - 1
        counts = self._counts(np.arange(first, first + CHUNK))
        totals = self._before[-1] + np.cumsum(counts, 0)
        # an earlier mixture may have read more of a source than this one allows
        over = ((totals > self._limits) & (counts > 0)).any(1)
        good = int(over.argmax()) if over.any() else CHUNK
        self._before = np.concatenate([self._before, totals[:good]])
        if good < CHUNK:
            self._open &= (totals[good] <= self._limits) | (counts[good] == 0)

    def _counts(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sequences of each source in each step, [T, K]."""
        shares = np.stack([weight_at(knots, steps) for knots in self._weights], 1) * self._open
        total = shares.sum(1)
        if (total <= 0).any():
            step = int(steps[(total <= 0).argmax()])
            raise UserError(f"data.sources: no source has anything left at step {step}: raise max_epochs or lower training.steps")
        ends = np.cumsum(shares, 1) / total[:, None] * self.per_step
        ends[:, -1] = self.per_step
        whole = np.floor(ends + uniform(self._seed, 0, steps)[:, None]).astype(np.int64)
        return np.diff(np.minimum(whole, self.per_step), axis=1, prepend=0)

    def _make_order(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of each of a step's sequences [B], and which of that source's sequences it is [B]."""
        before = self.before(step)
        counts = self.before(step + 1) - before
        mixed = np.argsort(uniform(self._seed, 1, step, np.arange(self.per_step)), kind="stable")
        sources = np.repeat(np.arange(len(counts)), counts)[mixed]
        numbers = np.empty_like(sources)
        for source, (first, count) in enumerate(zip(before, counts, strict=True)):
            numbers[sources == source] = np.arange(first, first + count)
        return sources, numbers

    def place(self, sequence: int) -> tuple[int, int]:
        """Source of a sequence of the run, and its number among those of that source."""
        step, place = divmod(sequence - self._sequence, self.per_step)
        sources, numbers = self._order(self._step + step)
        return int(sources[place]), int(numbers[place])
