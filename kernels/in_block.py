"""Attention inside each block of m tokens, thousands of blocks at once: the attention of the diffusion head.

Legend: N blocks, M tokens a block, H heads, D width of a head.
"""

import math

import torch
import torch.nn.functional as F
from bitlm_dist.kernels.attention import missing
from torch import Tensor

BACKENDS = ("triton", "torch")  # the order in which ``auto`` asks them


def in_block_attention(qkv: Tensor, block: int, causal: bool = False, *, backend: str = "auto") -> Tensor:
    """Attention of every token to all tokens of its own block (paper, section 3.3), or to itself and those before it.

    Args:
        qkv: [..., M, 3, H, D], queries, keys and values packed; every leading index is a block. Any floating-point dtype.
        block: m, must equal the size of qkv's M.
        causal: a token does not see the later ones of its block.
        backend: ``torch`` takes all; ``triton`` (the project's own kernels) heads up to 128 wide and blocks up to 64 tokens on a
            GPU; ``auto`` is the latter where it can.

    Returns:
        [..., M, H, D]; at m = 1 the values themselves.

    Raises:
        ValueError: qkv has another shape, or the back end is not here or does not take it.
    """
    if qkv.dim() < 4 or qkv.shape[-3] != 3 or qkv.shape[-4] != block:
        raise ValueError(f"qkv {(*qkv.shape,)}: expected [..., {block}, 3, heads, head_width]")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"in-block attention backend {backend!r} does not exist: choose from {('auto', *BACKENDS)}")
    if block == 1:  # the softmax over one key is 1
        return qkv.select(-3, 2)
    if backend != "torch":
        reason = missing("triton")
        if reason is None:
            from bitlm_dist.kernels import triton_in_block

            reason = triton_in_block.unsupported(qkv)
            if reason is None:
                return triton_in_block.attention(qkv, causal)
        if backend == "triton":
            raise ValueError(f"in-block attention backend 'triton': {reason}; torch would take it")
    return _torch_attention(qkv, causal)


def _torch_attention(qkv: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(-2, -3) for x in qkv.unbind(-3))  # [..., H, M, D]
    if not torch.is_grad_enabled():  # one call: with few blocks the steps cost more than the numbers
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(-2, -3)
    # Fused attention saves memory that an m x m product does not need, and its backward is slower.
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        place = torch.arange(qkv.shape[-4], device=qkv.device)
        scores = scores.masked_fill(place > place.unsqueeze(-1), -math.inf)
    return (scores.softmax(-1) @ v).transpose(-2, -3)
