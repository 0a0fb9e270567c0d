"""Attention inside each block of m tokens, thousands of blocks at once: the attention of the diffusion head.

Legend: N blocks, M tokens a block, H heads, D width of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 2**15  # numbers of qkv up to which one fused call is faster


def in_block_attention(qkv: Tensor, block: int, causal: bool = False) -> Tensor:
    """Attention of every token to all tokens of its own block (paper, section 3.3), or to itself and those before it.

    Args:
        qkv: [..., M, 3, H, D], queries, keys and values packed; every leading index is a block.
        block: m, must equal the size of qkv's M.
        causal: a token does not see the later ones of its block.

    Returns:
        [..., M, H, D].

    Raises:
        ValueError: qkv has another shape.
    """
    if qkv.dim() < 4 or qkv.shape[-3] != 3 or qkv.shape[-4] != block:
        raise ValueError(f"qkv {(*qkv.shape,)}: expected [..., {block}, 3, heads, head_width]")
    q, k, v = qkv.unbind(-3)
    if block == 1:  # the softmax over one key is 1
        return v
    if qkv.numel() <= FEW and not torch.is_grad_enabled():  # the steps cost more than the numbers
        q, k, v = q.transpose(-2, -3), k.transpose(-2, -3), v.transpose(-2, -3)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(-2, -3)
    # An m x m product is too small for a batched matrix kernel: m^2 dot products, elementwise, are faster.
    scores = (q.unsqueeze(-3) * k.unsqueeze(-4)).sum(-1) / math.sqrt(q.shape[-1])  # [..., M, M, H]
    if causal:
        place = torch.arange(block, device=qkv.device)
        scores = scores.masked_fill((place > place.unsqueeze(-1)).unsqueeze(-1), -math.inf)
    return (scores.softmax(-2).unsqueeze(-1) * v.unsqueeze(-4)).sum(-3)
