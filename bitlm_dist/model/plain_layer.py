"""The backbone's layer in plain PyTorch, on weights in Megatron's layout.

Megatron's layers spend about a millisecond each on Python, whatever the tensors: nothing beside a training step, half the time of
writing a block. So decoding runs this function on the same weights, and the bench trains with it to see what the stack costs.

Legend: B batch, S tokens, D width, G key-value heads, R query heads of each, E width of a head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitlm_dist.kernels.few_rows import linear


class LayerWeights(NamedTuple):
    """The weights of one layer; a matrix is [out, in]."""

    norm1: Tensor
    qkv: Tensor  # rows ordered [G, R + 2, E]: the queries of a key-value head, its key, its value
    qk_norm: Tensor  # [R + 1, E]: the queries' norm R times, then the key's
    out: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) · weight over the last dimension; ``weight`` may have more dimensions."""
    shape, eps = x.shape[-1:], 1e-6
    return F.rms_norm(x, shape, weight, eps) if weight.dim() == 1 else F.rms_norm(x, shape, None, eps) * weight


def rotary_angles(positions: Tensor, base: float, size: int) -> Tensor:
    """Angles of the rotary embedding at positions [...]: [..., E], the same for both halves of E."""
    half = positions[..., None] * base ** (-torch.arange(0, size, 2, device=positions.device) / size)
    return torch.cat((half, half), -1)


def rotary(first: int, last: int, base: float, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [S, 1, 1, E] of positions first..last-1, for :func:`layer`, in device and dtype of ``like``."""
    angles = rotary_angles(torch.arange(first, last, device=like.device), base, size)[:, None, None]
    sign = torch.ones(size, device=like.device)
    sign[: size // 2] = -1
    return angles.cos().to(like.dtype), (angles.sin() * sign).to(like.dtype)


def layer(
    x: Tensor, w: LayerWeights, cos: Tensor, sin: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], groups: int
) -> Tensor:
    """Pre-norm attention with QK-norm and rotary positions, then SwiGLU: x [B, S, D] -> [B, S, D].

    Args:
        cos, sin: of :func:`rotary`.
        attend: q [B, G·R, S, E], k and v [B, G, S, E] -> [B, G·R, S, E].
        groups: G.
    """
    heads, size = w.qk_norm.shape
    qkv = linear(rms_norm(x, w.norm1), w.qkv).unflatten(-1, (groups, heads + 1, size))
    qk = rms_norm(qkv[..., :heads, :], w.qk_norm)
    qk = (qk * cos + qk.roll(size // 2, -1) * sin).permute(0, 2, 3, 1, 4)
    attended = attend(qk[:, :, :-1].flatten(1, 2), qk[:, :, -1], qkv[..., -1, :].transpose(1, 2))
    x = x + linear(attended.transpose(1, 2).flatten(2), w.out)
    gate, up = linear(rms_norm(x, w.norm2), w.gate_up).chunk(2, -1)
    return x + linear(F.silu(gate) * up, w.down)
