"""torch's Muon, with matrices of one shape orthogonalised together and in a precision that the device is fast in.

torch.optim.Muon iterates in bfloat16, one matrix at a time: right for a GPU, but on a CPU without bfloat16 units it takes longer
than the rest of the training step. Hyper-parameters, state and update are torch's.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitlm_dist.model.initialization import cut, join, split_dimension
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import Layout


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrices: [n, rows, columns] -> the same shape (Jordan et al., 2024).

    Computes in bfloat16 on CUDA and in float32 elsewhere.
    """
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Muon):
    """Momentum, orthogonalised (Nesterov if the group says so); the step is scaled by sqrt(max(1, rows/columns)).

    Args:
        groups: parameter groups with the matrices' global ``names`` beside ``params``; of a split matrix, this rank's share.
        layout: of the job; the tensor ranks hold the same names.
        settings: those of torch.optim.Muon.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], layout: Layout, **settings: Any) -> None:
        super().__init__(list(groups), **settings)
        self._names = {p: name for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
        self._layout = layout

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "the training loop computes gradients itself"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            wholes = self._whole(parameters, [self._momentum(p, group) for p in parameters])
            by_shape = defaultdict(list)
            for parameter, whole in zip(parameters, wholes, strict=True):
                by_shape[whole.shape].append((parameter, whole))
            for shape, pairs in by_shape.items():
                updates = orthogonalize(
                    torch.stack([whole for _, whole in pairs]), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    mine = cut(self._names[parameter], update, self._layout.tensor_rank, self._layout.tensor)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(mine, alpha=-scale)

    def _whole(self, parameters: list[Tensor], shares: list[Tensor]) -> list[Tensor]:
        """Shares of the tensor ranks -> whole matrices, in one exchange."""
        ranks = self._layout.tensor
        split = [split_dimension(self._names[p]) is not None for p in parameters]
        if ranks == 1 or not any(split):
            return shares
        flat = torch.cat([share.flatten() for share, is_split in zip(shares, split, strict=True) if is_split])
        every = [torch.empty_like(flat) for _ in range(ranks)]
        torch.distributed.all_gather(every, flat, group=mesh.tensor_group())
        wholes, at = [], 0
        for parameter, share, is_split in zip(parameters, shares, split, strict=True):
            if is_split:
                parts = [one[at : at + share.numel()].view_as(share) for one in every]
                at += share.numel()
                share = join(self._names[parameter], parts)
            wholes.append(share)
        return wholes

    def momentum_of(self, parameter: Tensor) -> Tensor:
        """The buffer that is the state of a matrix, made if no step has been taken."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        grad = parameter.grad
        assert grad is not None
        buffer = self.momentum_of(parameter).lerp_(grad, 1 - group["momentum"])
        return grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer.clone()
