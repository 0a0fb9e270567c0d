"""Assignment of the sequences of a run to the sources of a mixture, by weights that may change.

The batch of each step holds each source in proportion to its weight, rounded up or down. One random
offset per step, a function of (seed, step), decides how to round. So the proportions are right on
average, and no step deviates by more than one sequence. Nothing depends on ranks or restarts.

Legend: K sources, B sequences per step, T steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitlm_dist.errors import UserError

STEPS_PER_CHUNK = 4096  # steps that are computed at once
WeightSchedule = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Origin:
    """Point of a run at which a mixture takes over.

    Attributes:
        step: first step that reads from the mixture.
        sequence: global index of the first sequence of that step.
        taken: number of sequences of each source that were read before, by the source's key. A
            source that left the mixture keeps its entry, so that it continues where it stopped if
            it comes back.
    """

    step: int = 0
    sequence: int = 0
    taken: Mapping[str, int] = field(default_factory=dict)


BEGINNING = Origin()


def interpolate_weights(schedule: WeightSchedule, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Evaluate a weight schedule at each step.

    The weight is linear between the knots (step, weight), and constant before the first and after
    the last one.
    """
    knot_steps, weights = zip(*schedule, strict=True)
    return np.interp(steps, knot_steps, weights)


def uniform(seed: int, *counters: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """Counter-based uniform random numbers in [0, 1).

    They are a function of the seed and the counters alone: the mixing function of splitmix64 is
    applied once per counter.
    """
    with np.errstate(over="ignore"):
        state: Any = np.uint64(seed)
        for counter in counters:
            state = (state ^ np.asarray(counter).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))

    # The upper 53 bits fill the mantissa of a float64.
    return (np.asarray(state) >> np.uint64(11)).astype(np.float64) / 2.0**53


class Mixture:
    """Maps each sequence of a run to a source and to a sequence of that source.

    Args:
        weight_schedules: weight of each source by step. The weights must add up to 1 at every step.
        sequences_per_step: B.
        seed: seed of the run.
        limits: maximum number of sequences of each source; None: unlimited. A source whose next
            step would exceed its limit is left out from that step on, and its weight is
            redistributed in proportion.
        first_step: step of the run at which this mixture takes over.
        first_sequence: global index of the first sequence of that step.
        sequences_read: sequences [K] of each source that were read before. They count towards its
            limit. None: none.
    """

    def __init__(
        self,
        weight_schedules: Sequence[WeightSchedule],
        sequences_per_step: int,
        seed: int,
        limits: Sequence[int | None],
        *,
        first_step: int = 0,
        first_sequence: int = 0,
        sequences_read: Sequence[int] | None = None,
    ) -> None:
        self._weight_schedules = weight_schedules
        self.sequences_per_step = sequences_per_step
        self._seed = seed
        self._first_step = first_step
        self._first_sequence = first_sequence
        self._limits = np.array(
            [np.iinfo(np.int64).max if limit is None else limit for limit in limits]
        )

        # Sources that have not reached their limits at the last step that was computed.
        self._has_sequences_left = np.ones(len(weight_schedules), dtype=bool)

        # Cumulative sequences [T + 1, K] of each source before each step of this mixture.
        self._sequences_before = np.array(
            [[0] * len(weight_schedules) if sequences_read is None else sequences_read],
            dtype=np.int64,
        )
        self._step_assignment = lru_cache(maxsize=4)(self._assign_step)

    def sequences_before(self, step: int) -> NDArray[np.int64]:
        """Count the sequences [K] that the steps before ``step`` take from each source.

        Args:
            step: must be a step of this mixture.

        Raises:
            UserError: All sources reach their limits before ``step``.
        """
        assert step >= self._first_step, "an earlier mixture read that step"
        while len(self._sequences_before) <= step - self._first_step:
            self._extend()
        return self._sequences_before[step - self._first_step]

    def _extend(self) -> None:
        """Compute the counts of the next steps, up to the first at which a source runs out."""
        first = self._first_step + len(self._sequences_before) - 1
        counts = self._sequences_by_step(np.arange(first, first + STEPS_PER_CHUNK))
        totals = self._sequences_before[-1] + np.cumsum(counts, 0)

        # A source that is not read may exceed its limit: an earlier mixture may have read more of
        # it than this one allows.
        is_over_limit = ((totals > self._limits) & (counts > 0)).any(1)
        num_good_steps = int(is_over_limit.argmax()) if is_over_limit.any() else STEPS_PER_CHUNK
        self._sequences_before = np.concatenate([self._sequences_before, totals[:num_good_steps]])

        # The later steps are computed again by the next call, without the exhausted sources.
        if num_good_steps < STEPS_PER_CHUNK:
            self._has_sequences_left &= (totals[num_good_steps] <= self._limits) | (
                counts[num_good_steps] == 0
            )

    def _sequences_by_step(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Count the sequences [T, K] of each source in each step."""
        weights = (
            np.stack(
                [interpolate_weights(schedule, steps) for schedule in self._weight_schedules], 1
            )
            * self._has_sequences_left
        )
        total = weights.sum(1)
        if (total <= 0).any():
            step = int(steps[(total <= 0).argmax()])
            raise UserError(
                f"data.sources: no source has anything left at step {step}: "
                "raise max_epochs or lower training.steps"
            )

        # Systematic sampling: all boundaries between sources are shifted by the same random offset
        # before they are rounded down, so that each count has the right mean.
        ends = np.cumsum(weights, 1) / total[:, None] * self.sequences_per_step
        ends[:, -1] = self.sequences_per_step
        boundaries = np.floor(ends + uniform(self._seed, 0, steps)[:, None]).astype(np.int64)
        return np.diff(np.minimum(boundaries, self.sequences_per_step), axis=1, prepend=0)

    def _assign_step(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Assign the sequences of a step.

        Returns:
            The source of each sequence [B], and its index among the sequences of that source [B].
        """
        before = self.sequences_before(step)
        counts = self.sequences_before(step + 1) - before

        # Shuffled, so that each rank and microbatch gets a mix of the sources.
        mixed = np.argsort(
            uniform(self._seed, 1, step, np.arange(self.sequences_per_step)), kind="stable"
        )
        sources = np.repeat(np.arange(len(counts)), counts)[mixed]

        numbers = np.empty_like(sources)
        for source, (first, count) in enumerate(zip(before, counts, strict=True)):
            numbers[sources == source] = np.arange(first, first + count)
        return sources, numbers

    def locate(self, sequence_index: int) -> tuple[int, int]:
        """Locate a sequence of the run.

        Returns:
            The index of its source, and its index among the sequences of that source.
        """
        step, position = divmod(sequence_index - self._first_sequence, self.sequences_per_step)
        sources, numbers = self._step_assignment(self._first_step + step)
        return int(sources[position]), int(numbers[position])
