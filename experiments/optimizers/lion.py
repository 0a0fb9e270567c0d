"""Lion: steps by the sign of an averaged gradient (Chen et al., 2023, arXiv 2302.06675).

The example of docs/how-to.md, "An optimizer".
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bitlm_dist.parallel.partition import Partition
from bitlm_dist.training.config import OptimizerConfig
from bitlm_dist.training.optimizers.base import assign_if


class Lion:
    """An :class:`~bitlm_dist.training.optimizers.base.UpdateRule`.

    Args:
        config: the learning rate and betas of AdamW.
    """

    is_elementwise = True

    def __init__(self, config: OptimizerConfig) -> None:
        self.peak_lr = config.adamw_lr
        self._betas = config.betas

    def init_state(self, flat: Tensor) -> dict[str, Tensor]:
        """The averaged gradient."""
        return {"exp_avg": torch.zeros_like(flat)}

    def update(
        self, partitions: Sequence[Partition], lr: float, weight_decay: float, applied: Tensor
    ) -> None:
        """Update the partitions, see the base class."""
        for partition in partitions:
            average = partition.state["exp_avg"]
            direction = average.lerp(partition.grad, 1 - self._betas[0]).sign()
            decayed = partition.flat * (1 - lr * weight_decay)

            assign_if(applied, partition.flat, decayed.add_(direction, alpha=-lr))
            assign_if(applied, average, average.lerp(partition.grad, 1 - self._betas[1]))
