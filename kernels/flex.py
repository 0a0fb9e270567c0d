"""FlexAttention of torch with the tiles of the mask computed in closed form, not found by ``create_block_mask``.

The mask reads what a query sees, [low, high), from tensors. Block size, documents and keys before the first query are numbers in
them and never constants of a kernel, so none of these compiles anything anew. Sizes do at most twice: the first ones get a kernel
of their own, all others share one with symbolic sizes (one more each where B or a number of tiles is 1, or where S < 128, which
torch decodes with another kernel). ``scale``, D, H, G and the dtype are constants: one model has one of each.

On a CPU every size gets a kernel of its own: with symbolic sizes the C++ that torch 2.13 writes may not compile.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from bitlm_dist.kernels.block_sparse import once_per_mask, tile_lists
from bitlm_dist.kernels.call import Call, seen_by_queries
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

TILE = 128  # of queries and of keys: every tile that torch picks for its kernels divides it
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NARROWEST = 16  # tl.dot of the compiled kernels
RECOMPILATIONS = 64  # more than the kinds of calls above, with and without documents and gradients
WIDEST = 256  # where torch's tables of tile sizes end


def unsupported(call: Call) -> str | None:
    """Why FlexAttention does not take this call; None if it does."""
    if call.q.device.type not in ("cuda", "cpu"):
        return f"q is on {call.q.device}: FlexAttention runs on CUDA devices and CPUs"
    if call.q.dtype not in DTYPES:
        return f"q is {call.q.dtype}: FlexAttention supports {DTYPES}"
    if call.q.is_cuda:
        if not NARROWEST <= call.q.shape[3] <= WIDEST:
            return f"head width {call.q.shape[3]}: FlexAttention supports {NARROWEST} to {WIDEST}"
        return None
    if call.differentiated:
        return "FlexAttention has no backward on a CPU"
    return None if torch.cpu._is_avx2_supported() else "FlexAttention needs a CPU with AVX2"


def attention(call: Call) -> Tensor:
    """Block-causal attention [B, H, S, D]."""
    q, k, v = call.q, call.k, call.v
    if not q.numel():
        return q.clone()
    if not call.differentiated:
        q, k, v = q.detach(), k.detach(), v.detach()  # on a CPU torch refuses requires_grad even under no_grad
    options: dict[str, Any] = {"block_mask": block_mask(call), "scale": call.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, **options)
    with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS):
        return _compiled(None if q.is_cuda else False)(q, k, v, **options)


@functools.cache
def _compiled(dynamic: bool | None) -> Callable[..., Any]:
    # fullgraph: past the limit of recompilations an error, not the uncompiled flex_attention with its S x T scores.
    return torch.compile(flex_attention, fullgraph=True, dynamic=dynamic)


@once_per_mask
def block_mask(call: Call) -> BlockMask:
    """The mask as torch takes it, with the lists of both passes."""
    # Keep neither option of torch that fits a causal mask: with two partial tiles in a row of tiles a query may see nothing of
    # the first (ROWS_GUARANTEED_SAFE would give NaN), and they lie on both sides of the full ones (BLOCKS_ARE_CONTIGUOUS).
    lists = tile_lists(call, TILE, TILE)
    sizes = (call.q.shape[2], call.k.shape[2])
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=TILE, mask_mod=_mask(call), seq_lengths=sizes)


def _mask(call: Call) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    low, high = (x.clone() for x in seen_by_queries(call))
    if call.bounds is None:
        ends = high[0]
        return lambda batch, head, query, key: key < ends[query]
    return lambda batch, head, query, key: (key >= low[batch, query]) & (key < high[batch, query])
