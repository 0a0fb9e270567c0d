"""torch's Muon, with matrices of one shape orthogonalised together and in a precision that the device is fast in.

torch.optim.Muon iterates in bfloat16, one matrix at a time: right for a GPU, but on a CPU without bfloat16 units it takes longer
than the rest of the training step. Hyper-parameters, state and update are torch's.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
    """Momentum, orthogonalised (Nesterov if the group says so); the step is scaled by sqrt(max(1, rows/columns))."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "the training loop computes gradients itself"
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._momentum(p, group) for p in parameters])
                updates = orthogonalize(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        return grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer.clone()
