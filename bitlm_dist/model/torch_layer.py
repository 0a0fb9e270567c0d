"""The backbone's layer in plain PyTorch, on weights in Megatron's layout.

Each Megatron layer spends about a millisecond in Python, whatever the size of its tensors. That is
negligible in a training step but half of the time to decode a block. Decoding therefore runs this
function on the same weights, and the benchmark trains with it to measure the cost of the stack.

Legend: B batch, S tokens, D hidden size, G key-value heads, R query heads per key-value head,
E head dimension.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitlm_dist.kernels.skinny_linear import linear
from bitlm_dist.model.fused_regions import RMS_NORM_EPS


class LayerWeights(NamedTuple):
    """The weights of one layer; matrices are [out, in]."""

    norm1: Tensor
    qkv: Tensor  # rows ordered [G, R + 2, E]: a key-value head's queries, then its key and value
    qk_norm: Tensor  # [R + 1, E]: the norm of the queries R times, then that of the key
    out: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Compute x / rms(x) · weight over the last dimension; ``weight`` may have more dimensions."""
    shape = x.shape[-1:]
    return (
        F.rms_norm(x, shape, weight, RMS_NORM_EPS)
        if weight.dim() == 1
        else F.rms_norm(x, shape, None, RMS_NORM_EPS) * weight
    )


def rotary_cos_sin(
    positions: Tensor, theta: float, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rotary factors at positions [...].

    Returns:
        Cosines and signed sines [..., E], so that x · cos + roll(x, E / 2) · sin rotates x.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    half = positions[..., None] * frequencies
    cos = half.cos()
    sin = half.sin()

    # Both halves of E turn by the same angles; the sign of rotate_half is folded into the sines.
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def transformer_layer(
    x: Tensor,
    w: LayerWeights,
    cos: Tensor,
    sin: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    num_kv_heads: int,
) -> Tensor:
    """Pre-norm attention with QK-norm and rotary positions, then SwiGLU.

    Args:
        x: [B, S, D].
        w: weights of the layer.
        cos, sin: [S, 1, 1, E], from :func:`rotary_cos_sin`.
        attend: maps q [B, G·R, S, E], k and v [B, G, S, E] to [B, G·R, S, E].
        num_kv_heads: G.

    Returns:
        [B, S, D].
    """
    queries_per_group, head_dim = w.qk_norm.shape
    qkv = linear(rms_norm(x, w.norm1), w.qkv).unflatten(
        -1, (num_kv_heads, queries_per_group + 1, head_dim)
    )

    # Queries and keys are normed and rotated together.
    qk = rms_norm(qkv[..., :queries_per_group, :], w.qk_norm)
    qk = (qk * cos + qk.roll(head_dim // 2, -1) * sin).permute(0, 2, 3, 1, 4)
    attended = attend(qk[:, :, :-1].flatten(1, 2), qk[:, :, -1], qkv[..., -1, :].transpose(1, 2))
    x = x + linear(attended.transpose(1, 2).flatten(2), w.out)

    gate, up = linear(rms_norm(x, w.norm2), w.gate_up).chunk(2, -1)
    return x + linear(F.silu(gate) * up, w.down)
