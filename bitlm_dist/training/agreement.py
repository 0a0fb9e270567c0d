"""What all ranks decide together: when to stop, when to save, and when a save is complete."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.device import copy_to_device
from bitlm_dist.parallel.layout import ParallelLayout


class Flags(NamedTuple):
    """Flags of one rank; the ranks agree on the maximum of each."""

    stop: int = 0  # see :attr:`~bitlm_dist.training.stop_signals.StopMonitor.code`
    is_writing: int = 0  # 1 while a file of the pending save is being written
    is_save_due: int = 0  # 1 if a time-based save is due, according to rank 0's clock


class Agreement:
    """Reduces the flags of all ranks, so that all of them act on the same values at the same step.

    A job of one process has nothing to agree on, and always acts on its current flags.

    Args:
        local_flags: returns this rank's current flags.
        layout: the job's parallel layout.
    """

    def __init__(self, local_flags: Callable[[], Flags], layout: ParallelLayout) -> None:
        self._local_flags = local_flags
        self._is_alone = layout.world_size == 1

    def start(self) -> Tensor:
        """Start to reduce the current flags, without a wait. Collective.

        Returns:
            A tensor on the device, whose values go to :meth:`result`.
        """
        device = mesh.device()
        if self._is_alone:
            return torch.empty(0, device=device)

        return mesh.all_reduce_max(copy_to_device(torch.tensor(self._local_flags()), device))

    def result(self, values: Sequence[float]) -> Flags:
        """The flags to act on, from the values of the tensor that :meth:`start` returned."""
        return self._local_flags() if self._is_alone else Flags(*map(int, values))

    def now(self) -> Flags:
        """Reduce the current flags and wait for the result. Collective; for an idle device."""
        return self.result([] if self._is_alone else self.start().tolist())
