"""Reduces over all ranks what :func:`~bitlm_dist.recording.record` collects in a step."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.recording import Key, take_records


class Recorder:
    """Reduces the records of each step. Collective.

    The ranks of a pipeline run different code, so they exchange the names of what they record. They
    do so once, in the first step.

    Args:
        layout: the job's parallel layout.
    """

    def __init__(self, layout: ParallelLayout) -> None:
        self._layout = layout
        self._keys: list[Key] | None = None

    def start(self) -> Tensor:
        """Start to reduce what was recorded, without a wait after the first step.

        Returns:
            A tensor on the device, whose values go to :meth:`result`.

        Raises:
            RuntimeError: a name was not recorded by any rank in the first step, or was recorded
                there with two reductions.
        """
        records = take_records()
        if self._keys is None:
            keys_per_rank = mesh.all_gather_object(list(records), self._layout)
            self._keys = sorted({key for keys in keys_per_rank for key in keys})
            for (name, reduce), (other, other_reduce) in pairwise(self._keys):
                if name == other:
                    raise RuntimeError(
                        f"record({name!r}) has two reductions: {reduce} and {other_reduce}"
                    )

        if unknown := sorted(records.keys() - set(self._keys)):
            raise RuntimeError(f"record({unknown[0][0]!r}) must be called in the first step, too")
        if not self._keys:
            return torch.empty(0, device=mesh.device())
        return self._reduce(records, self._keys)

    def _reduce(self, records: dict[Key, Tensor], keys: Sequence[Key]) -> Tensor:
        """Value and number of calls of every key, [K, 2]."""
        some = next(iter(records.values()), torch.zeros(2, device=mesh.device()).double())
        sums = torch.stack([records.get(key, torch.zeros_like(some)) for key in keys])
        maxima = torch.stack([records.get(key, torch.full_like(some, -torch.inf)) for key in keys])
        if self._layout.world_size > 1:
            mesh.all_reduce_sum(sums)
            mesh.all_reduce_max(maxima)

        total, number = sums.unbind(1)
        # the maximum over ranks may lose a NaN, which the sum never does
        largest = torch.where(total.isnan(), total, maxima[:, 0])
        values = {"mean": total / number, "sum": total, "max": largest}
        chosen = torch.stack([values[reduce][i] for i, (_, reduce) in enumerate(keys)])
        return torch.stack([chosen, number], dim=1)

    def result(self, values: Sequence[float]) -> dict[str, float]:
        """The reduced values by name, from those of the tensor that :meth:`start` returned.

        A name that no rank recorded in the step is left out.
        """
        pairs = zip(values[::2], values[1::2], strict=True)
        return {
            name: value
            for (name, _), (value, number) in zip(self._keys or (), pairs, strict=True)
            if number
        }
