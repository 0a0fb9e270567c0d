"""AdamW, by torch's fused kernel (Loshchilov & Hutter, 2019)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from bitlm_dist.config import OptimizerConfig
from bitlm_dist.parallel.partition import Partition


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
        return {
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
        }

    def update(
        self, partitions: Sequence[Partition], lr: float, weight_decay: float, applied: Tensor
    ) -> None:
        """Update the partitions, see the base class."""
        adamw(
            [p.flat for p in partitions],
            [p.flat.grad for p in partitions if p.flat.grad is not None],
            [p.state["exp_avg"] for p in partitions],
            [p.state["exp_avg_sq"] for p in partitions],
            [],
            [p.state["step"] for p in partitions],
            fused=True,
            # The kernel leaves everything as it is where this is one.
            found_inf=applied.logical_not().float(),
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self._eps,
            maximize=False,
        )
