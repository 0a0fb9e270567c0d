"""torch's Muon with batched orthogonalisation, in a dtype that the device is fast in.

torch.optim.Muon iterates in bfloat16, one matrix at a time. That suits a GPU, but on a CPU without
bfloat16 units it takes longer than the rest of the training step. Here, matrices of one shape are
orthogonalised together. Hyper-parameters, state and update rule are torch's.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitlm_dist.model.initialization import shard, shard_dim, unshard
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout


def orthogonalize(
    matrices: Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> Tensor:
    """Iterate towards the nearest orthogonal matrices (Newton-Schulz; Jordan et al., 2024).

    Computes in bfloat16 on CUDA and in float32 elsewhere.

    Args:
        matrices: [n, rows, columns].
        coefficients: (a, b, c) of the quintic polynomial a x + b x^3 + c x^5.
        num_steps: Number of iterations.
        eps: Lower bound of the norm that a matrix is divided by.

    Returns:
        [n, rows, columns], in the dtype of ``matrices``.
    """
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)

    # The Gram matrix is cheaper on the shorter side.
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT

    # The iteration converges only if no singular value exceeds 1.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(eps)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.Muon):
    """Steps along the orthogonalised momentum, scaled by sqrt(max(1, rows/columns)).

    Args:
        groups: Parameter groups, with the matrices' global ``names`` beside ``params``. Of a matrix
            that is split over tensor-parallel ranks, the parameter is this rank's shard.
        layout: The job's parallel layout; all tensor-parallel ranks hold the same names.
        settings: Those of torch.optim.Muon, among them ``nesterov``.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], layout: ParallelLayout, **settings: Any
    ) -> None:
        super().__init__(list(groups), **settings)
        self._names = {
            p: name
            for group in groups
            for name, p in zip(group["names"], group["params"], strict=True)
        }
        self._layout = layout

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Collective over tensor-parallel ranks."""
        assert closure is None, "the training loop computes gradients itself"

        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            # Orthogonalisation needs full matrices, whatever the ranks hold of them.
            full_momenta = self._all_gather_full(
                parameters, [self._update_momentum(p, group) for p in parameters]
            )

            by_shape = defaultdict(list)
            for parameter, full in zip(parameters, full_momenta, strict=True):
                by_shape[full.shape].append((parameter, full))

            for shape, pairs in by_shape.items():
                updates = orthogonalize(
                    torch.stack([full for _, full in pairs]),
                    group["ns_coefficients"],
                    group["ns_steps"],
                    group["eps"],
                )

                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    local_update = shard(
                        self._names[parameter],
                        update,
                        self._layout.tensor_rank,
                        self._layout.tensor,
                    )
                    # Decoupled weight decay, as in AdamW.
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                        local_update, alpha=-scale
                    )

    def _all_gather_full(self, parameters: list[Tensor], shards: list[Tensor]) -> list[Tensor]:
        """Gather the tensor-parallel ranks' shards into full matrices, in one all-gather.

        Args:
            parameters: The parameters that the shards belong to, in the same order on all ranks.
            shards: This rank's shard of each; of a matrix that is not split, all of it.

        Returns:
            The full matrices, in the order of ``parameters``.
        """
        num_ranks = self._layout.tensor
        split = [shard_dim(self._names[p]) is not None for p in parameters]
        if num_ranks == 1 or not any(split):
            return shards

        flat = torch.cat(
            [
                rank_shard.flatten()
                for rank_shard, is_split in zip(shards, split, strict=True)
                if is_split
            ]
        )
        gathered = [torch.empty_like(flat) for _ in range(num_ranks)]
        torch.distributed.all_gather(gathered, flat, group=mesh.tensor_group())

        full_tensors = []
        offset = 0
        for parameter, rank_shard, is_split in zip(parameters, shards, split, strict=True):
            if is_split:
                # All ranks packed the same parameters, so the offsets are the same in every buffer.
                rank_shards = [
                    one[offset : offset + rank_shard.numel()].view_as(rank_shard)
                    for one in gathered
                ]
                offset += rank_shard.numel()
                rank_shard = unshard(self._names[parameter], rank_shards)
            full_tensors.append(rank_shard)
        return full_tensors

    def get_or_init_momentum(self, parameter: Tensor) -> Tensor:
        """The momentum buffer of a matrix, created as zeros before its first step."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _update_momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Update a matrix's momentum.

        Returns:
            The direction to be orthogonalised.
        """
        grad = parameter.grad
        assert grad is not None
        buffer = self.get_or_init_momentum(parameter).lerp_(grad, 1 - group["momentum"])
        return grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer.clone()
