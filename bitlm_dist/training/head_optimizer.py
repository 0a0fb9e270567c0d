"""AdamW and Muon on flat partitions of a sharded head: the same numbers as on whole tensors.

DeepSpeed has a Muon of its own, which orthogonalises gradients while it sums them: before their joint norm with the backbone is
known, so it could not be clipped as here, and in another precision. This one works on what ZeRO partitions.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitlm_dist.config import OptimizerConfig
from bitlm_dist.parallel.partition import Partition, Piece
from bitlm_dist.training import fused_adam
from bitlm_dist.training.muon import orthogonalize

NEWTON_SCHULZ = ((3.4445, -4.775, 2.0315), 5, 1e-7)  # coefficients, steps and eps of torch.optim.Muon


class HeadOptimizer(torch.optim.AdamW):
    """Groups with ``muon`` hold matrices for Muon, the others are AdamW's.

    Args:
        groups: of :func:`~bitlm_dist.training.optimizer.groups_of`, fp32 or the weights that fp32 partitions are made of.
        config: of the optimizers.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(list(groups), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        self._momentum, self._peaks = config.muon_momentum, [group["lr"] for group in groups]
        self.partitions: Callable[[], list[Partition]] = list  # of the engine that it works for
        self.scale, self.skip = 1.0, False

    def prepare(self, scale: float, factor: float, skip: bool = False) -> None:
        """The next step multiplies gradients by ``scale`` and peak learning rates by ``factor``, or does nothing."""
        self.scale, self.skip = scale, skip
        for group, peak in zip(self.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the partitions that ``param_groups`` hold now and that have a gradient."""
        if self.skip:
            return
        groups = self.param_groups
        for group in groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    flat.grad.mul_(self.scale)
        self.param_groups = [group for group in groups if not group["muon"]]
        if any(group["params"] for group in self.param_groups):
            super().step()
        self.param_groups = groups
        for group in groups:
            if group["muon"] and group["params"]:  # ZeRO-3 hands over one partition at a time
                self._orthogonal_step(group)

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        places = {id(partition.flat): partition for partition in self.partitions()}
        flats = [flat for flat in group["params"] if flat.grad is not None]
        buffers = [self.slots(flat, group)["momentum_buffer"].lerp_(flat.grad, 1 - self._momentum) for flat in flats]
        momenta = [flat.grad.lerp(buffer, self._momentum) for flat, buffer in zip(flats, buffers, strict=True)]
        for flat, update in zip(flats, _orthogonal([places[id(flat)] for flat in flats], momenta), strict=True):
            flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def slots(self, flat: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a partition, made if no step has been taken."""
        if not group["muon"]:
            return fused_adam.fill(self, flat, group)
        state: dict[str, Tensor] = self.state[flat]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(flat)
        return state


def _orthogonal(partitions: Sequence[Partition], momenta: Sequence[Tensor]) -> list[Tensor]:
    """Momenta in the place of weights -> updates in the place of weights; each rank orthogonalises some of the matrices."""
    tables = [partition.table(row) for partition, row in zip(partitions, momenta, strict=True)]
    updates = [torch.zeros_like(table) for table in tables]
    by_shape: dict[torch.Size, list[tuple[Piece, int]]] = defaultdict(list)
    for piece, number in _share_of_work(partitions):
        by_shape[piece.shape].append((piece, number))
    for shape, pieces in by_shape.items():
        found = orthogonalize(torch.stack([piece.read(tables[number]) for piece, number in pieces]), *NEWTON_SCHULZ)
        for (piece, number), update in zip(pieces, found * math.sqrt(max(1.0, shape[0] / shape[1])), strict=True):
            piece.write(updates[number], update)
    return [p.added(table) for p, table in zip(partitions, updates, strict=True)]


def _share_of_work(partitions: Sequence[Partition]) -> list[tuple[Piece, int]]:
    """The matrices that this rank orthogonalises, each with the number of its partition.

    The largest first, each to the rank with least so far; where partitions are whole on every rank, all to all.
    """
    load = [0] * partitions[0].ranks
    mine = []
    every = [(piece, number) for number, partition in enumerate(partitions) for piece in partition.pieces]
    for piece, number in sorted(every, key=lambda item: (-item[0].shape.numel(), item[0].name)):
        rank = load.index(min(load))
        load[rank] += piece.shape.numel()
        if rank == partitions[number].rank:
            mine.append((piece, number))
    return mine
