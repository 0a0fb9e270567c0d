"""Elementwise stretches of a backbone layer, each one kernel where regions are compiled.

Legend: S tokens on this rank, B batch, D hidden size, F intermediate size, H heads, E head
dimension.
"""

import torch.nn.functional as F
from torch import Tensor

from bitlm_dist.compilation import compiled_region

RMS_NORM_EPS = 1e-6


@compiled_region
def add_and_norm(residual: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and norm the sum.

    Args:
        residual, branch: [S, B, D].
        weight: [D], of the RMSNorm.

    Returns:
        The new residual stream and its RMSNorm, each [S, B, D].
    """
    total = residual + branch
    return total, F.rms_norm(total, total.shape[-1:], weight, RMS_NORM_EPS)


@compiled_region
def norm_and_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Norm queries or keys, then rotate them to their positions.

    Args:
        x: [S, B, …, E].
        weight: [E], of the RMSNorm.
        cos, sin: [S, 1, …, E], from :func:`~bitlm_dist.model.torch_layer.rotary_cos_sin`.

    Returns:
        [S, B, …, E], contiguous.
    """
    x = F.rms_norm(x, x.shape[-1:], weight, RMS_NORM_EPS)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


@compiled_region
def swiglu(gate_and_up: Tensor) -> Tensor:
    """Map the gate and the up projection [S, B, 2·F] to silu(gate) · up [S, B, F]."""
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate) * up
