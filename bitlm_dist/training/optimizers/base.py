"""What an optimizer is: one update rule for lists of partitions."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bitlm_dist.parallel.partition import Partition


class UpdateRule(Protocol):
    """Updates fp32 partitions by their gradients.

    A new one is a file with such a class, and an entry in
    :data:`~bitlm_dist.registry.OPTIMIZERS`. Everything else is the same for all of them: parameter
    groups, clipping, schedule, sharding, moving averages and checkpoints.
    """

    is_elementwise: bool
    """True if an element's update depends on no other element, so that tensors may be split."""
    peak_lr: float
    """Peak learning rate."""

    def init_state(self, flat: Tensor) -> dict[str, Tensor]:
        """The initial state of a partition by slot: laid out like ``flat``, or scalars."""

    def update(
        self, partitions: Sequence[Partition], lr: float, weight_decay: float, applied: Tensor
    ) -> None:
        """Update ``flat`` and ``state`` of partitions that have a gradient. Collective.

        The host must not wait for the device here.

        Args:
            partitions: partitions with the same options; gradients are clipped, and may be
                overwritten.
            lr: learning rate of this step.
            weight_decay: decoupled weight decay.
            applied: bool []. If False, nothing may change, and gradients may be NaN.
        """


def assign_if(applied: Tensor, target: Tensor, value: Tensor) -> None:
    """Copy ``value`` to ``target`` if ``applied``, decided on the device."""
    torch.where(applied, value, target, out=target)
