"""AdamW, by torch's fused kernel (Loshchilov & Hutter, 2019)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from bitlm_dist.parallel.partition import Partition
from bitlm_dist.training.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW:
    """An :class:`~bitlm_dist.training.optimizers.base.UpdateRule`.

    Args:
        config: peak learning rate, betas and epsilon.
    """

    is_elementwise = True

    def __init__(self, config: OptimizerConfig) -> None:
        self.peak_lr = config.adamw_lr
        self._betas = config.betas
        self._eps = config.eps

    def init_state(self, flat: Tensor) -> dict[str, Tensor]:
        """The moments, and the number of updates so far."""
        step = torch.zeros((), dtype=torch.float32, device=flat.device)
        return {slot: torch.zeros_like(flat) for slot in MOMENTS} | {"step": step}

    def update(
        self, partitions: Sequence[Partition], lr: float, weight_decay: float, applied: Tensor
    ) -> None:
        """Update the partitions, see the base class."""
        first, second, steps = ([p.state[slot] for p in partitions] for slot in (*MOMENTS, "step"))
        adamw(
            [p.flat for p in partitions],
            [p.grad for p in partitions],
            *(first, second, [], steps),
            fused=True,
            # Where this is one, the kernel changes nothing.
            found_inf=applied.logical_not().float(),
            beta1=self._betas[0],
            beta2=self._betas[1],
            eps=self._eps,
            lr=lr,
            weight_decay=weight_decay,
            amsgrad=False,
            maximize=False,
        )
