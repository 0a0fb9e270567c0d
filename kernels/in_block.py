"""Attention within each block of m tokens, thousands of blocks at once, as in the diffusion head.

Legend: N blocks, M tokens per block, H heads, D head dimension.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bitlm_dist.kernels.attention import unavailable_reason

BACKENDS = ("triton", "torch")  # in the order of preference of ``auto``


def in_block_attention(
    qkv: Tensor, block: int, causal: bool = False, *, backend: str = "auto"
) -> Tensor:
    """Attention of every token to all tokens of its block (paper, section 3.3), or causal within
    the block.

    Args:
        qkv: [..., M, 3, H, D], packed queries, keys and values in any floating-point dtype. Every
            leading index is a block.
        block: m, must equal the size of qkv's M.
        causal: if True, a token does not attend to later tokens of its block.
        backend: ``torch`` supports everything. ``triton``, the project's own kernels, supports
            head dimensions up to 128 and up to 64 tokens per block, on a GPU. ``auto`` selects
            ``triton`` where it is supported.

    Returns:
        [..., M, H, D]; for m = 1 the values themselves.

    Raises:
        ValueError: qkv has the wrong shape, or the backend does not exist, is unavailable or does
            not support qkv.
    """
    if qkv.dim() < 4 or qkv.shape[-3] != 3 or qkv.shape[-4] != block:
        raise ValueError(f"qkv {(*qkv.shape,)}: expected [..., {block}, 3, heads, head_dim]")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"in-block attention backend {backend!r} does not exist: "
            f"choose from {', '.join(('auto', *BACKENDS))}"
        )

    # the softmax over one key is 1
    if block == 1:
        return qkv.select(-3, 2)

    if backend != "torch":
        reason = unavailable_reason("triton")
        if reason is None:
            # imported here, as Triton need not be installed
            from bitlm_dist.kernels import triton_in_block

            reason = triton_in_block.unsupported_reason(qkv)
            if reason is None:
                return triton_in_block.attention(qkv, causal)
        if backend == "triton":
            raise ValueError(f"in-block attention backend 'triton': {reason}; torch would take it")

    return _torch_attention(qkv, causal)


def _torch_attention(qkv: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(-2, -3) for x in qkv.unbind(-3))  # [..., H, M, D]

    # Inference has few blocks: separate operators would cost more than the arithmetic.
    if not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(-2, -3)

    # Fused attention would save only the M x M scores, which are small, and its backward pass is
    # slower.
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        positions = torch.arange(qkv.shape[-4], device=qkv.device)
        scores = scores.masked_fill(positions > positions.unsqueeze(-1), -math.inf)
    return (scores.softmax(-1) @ v).transpose(-2, -3)
