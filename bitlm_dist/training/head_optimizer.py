"""AdamW and Muon on the flat partitions of a sharded head; the updates equal those on full tensors.

DeepSpeed's own Muon orthogonalises gradients while it reduces them. At that time their joint norm
with the backbone's is not known, so they could not be clipped as here, and it computes in another
dtype. This optimizer works on ZeRO's partitions instead.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitlm_dist.parallel.partition import ParamRange, Partition
from bitlm_dist.training import fused_adam
from bitlm_dist.training.config import OptimizerConfig
from bitlm_dist.training.muon import orthogonalize

# coefficients, steps and eps of torch.optim.Muon
NEWTON_SCHULZ = ((3.4445, -4.775, 2.0315), 5, 1e-7)


class HeadOptimizer(torch.optim.AdamW):
    """Muon for the parameter groups with ``muon``, AdamW for the others.

    Args:
        groups: parameter groups of :func:`~bitlm_dist.training.optimizer.build_param_groups`. They
            hold fp32 partitions, or the weights of which DeepSpeed makes fp32 partitions.
        config: the optimizer config.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(
            list(groups), lr=config.adamw_lr, betas=config.betas, eps=config.eps, fused=True
        )
        self._muon_momentum = config.muon_momentum
        self._peak_lrs = [group["lr"] for group in groups]
        self.partitions: Callable[[], list[Partition]] = list  # replaced by the head engine's

        # not `grad_scale`: torch's AdamW takes an attribute of that name for its own tensor
        self._grad_scale = 1.0
        self._skip_step = False

    def prepare_step(
        self, grad_scale: float, lr_multiplier: float, skip_step: bool = False
    ) -> None:
        """Set up the next :meth:`step`, which the head engine calls without arguments.

        Args:
            grad_scale: factor on the gradients.
            lr_multiplier: factor on the peak learning rates.
            skip_step: make the step a no-op.
        """
        self._grad_scale = grad_scale
        self._skip_step = skip_step
        for group, peak in zip(self.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * lr_multiplier

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the partitions that are in ``param_groups`` now and have a gradient.

        Collective over the ranks of the head.
        """
        if self._skip_step:
            return

        groups = self.param_groups
        for group in groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    flat.grad.mul_(self._grad_scale)

        # torch's AdamW must not see Muon's groups
        self.param_groups = [group for group in groups if not group["muon"]]
        if any(group["params"] for group in self.param_groups):
            super().step()
        self.param_groups = groups

        for group in groups:
            if group["muon"] and group["params"]:  # ZeRO-3 hands over one partition at a time
                self._muon_step(group)

    def _muon_step(self, group: dict[str, Any]) -> None:
        partition_by_id = {id(partition.flat): partition for partition in self.partitions()}
        flats = [flat for flat in group["params"] if flat.grad is not None]

        # Nesterov momentum, as in torch.optim.Muon
        buffers = [
            self.get_or_init_state(flat, group)["momentum_buffer"].lerp_(
                flat.grad, 1 - self._muon_momentum
            )
            for flat in flats
        ]
        momenta = [
            flat.grad.lerp(buffer, self._muon_momentum)
            for flat, buffer in zip(flats, buffers, strict=True)
        ]

        for flat, update in zip(
            flats,
            _orthogonalize_partitions([partition_by_id[id(flat)] for flat in flats], momenta),
            strict=True,
        ):
            flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def get_or_init_state(self, flat: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """State of a partition; zero-initialised before the first step."""
        if not group["muon"]:
            return fused_adam.get_or_init_state(self, flat, group)

        state: dict[str, Tensor] = self.state[flat]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(flat)
        return state


def _orthogonalize_partitions(
    partitions: Sequence[Partition], momenta: Sequence[Tensor]
) -> list[Tensor]:
    """Orthogonalise the momenta; each rank takes some of the matrices. Collective.

    Args:
        partitions: the partitions of the weights.
        momenta: this rank's momenta, laid out like the partitions.

    Returns:
        This rank's updates, laid out like the partitions.
    """
    gathered = [partition.gather(row) for partition, row in zip(partitions, momenta, strict=True)]
    updates = [torch.zeros_like(table) for table in gathered]

    # matrices of one shape are orthogonalised in one batch
    by_shape: dict[torch.Size, list[tuple[ParamRange, int]]] = defaultdict(list)
    for param_range, partition_index in _local_matrices(partitions):
        by_shape[param_range.shape].append((param_range, partition_index))

    for shape, param_ranges in by_shape.items():
        orthogonalized = orthogonalize(
            torch.stack(
                [
                    param_range.extract_full(gathered[partition_index])
                    for param_range, partition_index in param_ranges
                ]
            ),
            *NEWTON_SCHULZ,
        )
        for (param_range, partition_index), update in zip(
            param_ranges, orthogonalized * math.sqrt(max(1.0, shape[0] / shape[1])), strict=True
        ):
            param_range.insert_full(updates[partition_index], update)

    # the matrices of other ranks are still zero here, so the sum over ranks collects the updates
    return [p.reduce_to_local(table) for p, table in zip(partitions, updates, strict=True)]


def _local_matrices(partitions: Sequence[Partition]) -> list[tuple[ParamRange, int]]:
    """Select the matrices that this rank orthogonalises, each with the index of its partition.

    Matrices are assigned greedily: the largest first, each to the rank with the fewest elements so
    far. If every rank holds the full partitions, every rank gets all matrices.
    """
    numel_per_rank = [0] * partitions[0].group_size
    local_matrices = []
    all_matrices = [
        (param_range, partition_index)
        for partition_index, partition in enumerate(partitions)
        for param_range in partition.param_ranges
    ]

    # ties go by name, so that all ranks agree
    for param_range, partition_index in sorted(
        all_matrices, key=lambda item: (-item[0].shape.numel(), item[0].name)
    ):
        rank = numel_per_rank.index(min(numel_per_rank))
        numel_per_rank[rank] += param_range.shape.numel()
        if rank == partitions[partition_index].group_rank:
            local_matrices.append((param_range, partition_index))

    return local_matrices
