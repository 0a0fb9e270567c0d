"""FlexAttention of torch over a block mask in closed form, instead of ``create_block_mask``.

The mask reads the key range of a query, [low, high), from tensors. So block size, documents and the
number of past keys are data, never constants of a kernel, and none of them triggers a
recompilation. Sizes trigger at most two: the first sizes get their own kernel, and all others share
one with symbolic sizes. There is one more each if B or a number of tiles is 1, or if S < 128, for
which torch has a decoding kernel. ``scale``, D, H, G and the dtype are constants: a model has one
of each.

On a CPU every size gets its own kernel: with symbolic sizes, the C++ code that torch 2.13 generates
may not compile.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bitlm_dist.kernels.attention_inputs import AttentionInputs, visible_key_ranges
from bitlm_dist.kernels.block_sparse import cache_per_mask, tile_lists

TILE = 128  # queries and keys per tile: a multiple of every tile size that torch picks
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_HEAD_DIM = 16  # limit of tl.dot in the compiled kernels
MAX_HEAD_DIM = 256  # largest in torch's tables of tile sizes
RECOMPILE_LIMIT = 64  # more kernels than described above, with and without gradients


def unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Reason why FlexAttention does not support this call; None if it does."""
    if inputs.q.device.type not in ("cuda", "cpu"):
        return f"q is on {inputs.q.device}: FlexAttention runs on CUDA devices and CPUs"
    if inputs.q.dtype not in DTYPES:
        return f"q is {inputs.q.dtype}: FlexAttention supports {DTYPES}"

    if inputs.q.is_cuda:
        if not MIN_HEAD_DIM <= inputs.q.shape[3] <= MAX_HEAD_DIM:
            return (
                f"head dim {inputs.q.shape[3]}: "
                f"FlexAttention supports {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
            )
        return None

    if inputs.requires_grad:
        return "FlexAttention has no backward on a CPU"
    return None if torch.cpu._is_avx2_supported() else "FlexAttention needs a CPU with AVX2"


def attention(inputs: AttentionInputs) -> Tensor:
    """Compute block-causal attention.

    Returns:
        [B, H, S, D].
    """
    q = inputs.q
    k = inputs.k
    v = inputs.v
    if not q.numel():
        return q.clone()

    # on a CPU torch refuses tensors that require gradients, even under no_grad
    if not inputs.requires_grad:
        q = q.detach()
        k = k.detach()
        v = v.detach()

    options: dict[str, Any] = {
        "block_mask": block_mask(inputs),
        "scale": inputs.scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if torch.compiler.is_compiling():
        return flex_attention(q, k, v, **options)

    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return _compiled_flex_attention(None if q.is_cuda else False)(q, k, v, **options)


@functools.cache
def _compiled_flex_attention(dynamic: bool | None) -> Callable[..., Any]:
    # fullgraph: exceeding the recompile limit must be an error. Torch's fallback is uncompiled and
    # materializes the S x T scores.
    return torch.compile(flex_attention, fullgraph=True, dynamic=dynamic)


@cache_per_mask
def block_mask(inputs: AttentionInputs) -> BlockMask:
    """Build torch's BlockMask, with the tile lists of the forward and backward pass."""
    # Two kernel options for causal masks must stay off. ROWS_GUARANTEED_SAFE would give NaN, as a
    # query may attend to no key of its first partial tile. BLOCKS_ARE_CONTIGUOUS would be wrong, as
    # partial tiles lie on both sides of the full ones.
    lists = tile_lists(inputs, TILE, TILE)
    sizes = (inputs.q.shape[2], inputs.k.shape[2])
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=TILE, mask_mod=_mask_mod(inputs), seq_lengths=sizes
    )


def _mask_mod(inputs: AttentionInputs) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    # The mask is cached per bounds, so it must not keep them alive through a view.
    low, high = (x.clone() for x in visible_key_ranges(inputs))

    if inputs.document_bounds is None:
        ends = high[0]
        return lambda batch, head, query, key: key < ends[query]

    return lambda batch, head, query, key: (key >= low[batch, query]) & (key < high[batch, query])
