"""FlashAttention 4 (package flash-attn-4) with the block-causal mask as tile lists for both passes.

Without the lists its kernels would apply the mask to every tile: twice the work. The mask reads the
key range of a query, [low, high), from tensors, so one kernel serves every block size and document
layout.

Forward and backward are torch operators, ``bitlm::flash_attention_4`` and ``..._backward``, over
the functions behind the package's own autograd function. So torch.compile keeps its graph whole,
and the backward pass computes its own tile lists.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitlm_dist.kernels.attention_inputs import AttentionInputs, device_guard, visible_key_ranges
from bitlm_dist.kernels.block_sparse import (
    TileLists,
    cache_per_mask,
    tile_lists,
    transposed_tile_lists,
)

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = range(8, 129, 8)
HOPPER_MAJOR = 9  # major compute capability
MAX_TILE_ROWS = 256


class TileSizes(NamedTuple):
    """Tile sizes of the lists, as (queries, keys)."""

    forward: tuple[int, int]
    backward: tuple[int, int]


def unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Reason why FlashAttention 4 does not support this call; None if it does.

    Reads no elements of the tensors.
    """
    if inputs.q.dtype not in DTYPES:
        return f"q is {inputs.q.dtype}: FlashAttention 4 supports {DTYPES}"
    if inputs.q.shape[3] not in HEAD_DIMS:
        return (
            f"head dim {inputs.q.shape[3]}: "
            f"FlashAttention 4 supports multiples of 8 up to {HEAD_DIMS[-1]}"
        )
    if inputs.requires_grad and torch.are_deterministic_algorithms_enabled():
        return (
            "deterministic algorithms are required: "
            "FlashAttention 4 sums the gradient of q in no fixed order"
        )

    # meta tensors have shapes and gradients without a device
    if inputs.q.device.type == "meta":
        return None

    if not inputs.q.is_cuda:
        return f"q is on {inputs.q.device}: FlashAttention 4 needs a CUDA device"
    major, minor = torch.cuda.get_device_capability(inputs.q.device)
    if major not in (HOPPER_MAJOR, 10, 11):
        return (
            f"compute capability {major}.{minor}: "
            "FlashAttention 4 has no kernels with tile lists for it"
        )
    return None


def attention(inputs: AttentionInputs) -> Tensor:
    """Compute block-causal attention.

    Returns:
        [B, H, S, D] in the memory order of [B, S, H, D].
    """
    out: Tensor = _attention(
        inputs.q, inputs.k, inputs.v, inputs.document_bounds, inputs.block, inputs.scale
    )[0]
    return out


def tile_sizes(major: int, head_dim: int) -> TileSizes:
    """Tile sizes that the package's kernels accept, by major compute capability and head dim."""
    # on Blackwell the forward kernel processes two tiles of 128 queries at a time
    if major != HOPPER_MAJOR:
        return TileSizes((256, 128), (128, 128))
    return TileSizes((192 if head_dim <= 96 else 128, 128), (128, 128))


@torch.library.custom_op("bitlm::flash_attention_4", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    return forward(
        AttentionInputs(q, k, v, block, bounds, scale),
        torch.cuda.get_device_capability(q.device)[0],
    )


@_attention.register_fake
def _empty_outputs(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_bshd(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("bitlm::flash_attention_4_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(
        AttentionInputs(q, k, v, block, bounds, scale),
        out,
        lse,
        dout,
        torch.cuda.get_device_capability(q.device)[0],
    )


@_attention_backward.register_fake
def _empty_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_bshd(q), _empty_bshd(k), _empty_bshd(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, ctx.block, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bounds, *output)
    ctx.set_materialize_grads(False)  # lse never gets a gradient: allocate no zeros for it


def _backward(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    q, k, v, bounds, out, lse = ctx.saved_tensors
    if dout is None:
        return (None,) * 6

    return (
        *_attention_backward(dout, q, k, v, out, lse, bounds, ctx.block, ctx.scale),
        None,
        None,
        None,
    )


_attention.register_autograd(_backward, setup_context=_setup_context)


def forward(inputs: AttentionInputs, major: int) -> tuple[Tensor, Tensor]:
    """Run the forward kernel on a device of this major compute capability.

    Returns:
        out: [B, H, S, D].
        lse: natural log-sum-exp of the scores, [B, H, S].
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    tile = tile_sizes(major, inputs.q.shape[3]).forward
    out = _empty_bshd(inputs.q)
    lse = inputs.q.new_empty(inputs.q.shape[:3], dtype=torch.float32)

    with device_guard(inputs.q):
        _flash_attn_fwd(
            *_swap_heads_and_positions(inputs.q, inputs.k, inputs.v),
            softmax_scale=inputs.scale,
            pack_gqa=False,  # else the mask would divide by the group size in every row
            mask_mod=_mask_mod(inputs.document_bounds is not None),
            aux_tensors=_mask_tensors(inputs),
            block_sparse_tensors=_block_sparse_tensors(tile_lists(inputs, *tile), tile),
            out=out.transpose(1, 2),
            lse=lse,
        )

    return out, lse


def backward(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, dout: Tensor, major: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel on a device of this major compute capability.

    Returns:
        dq, dk, dv: [B, heads, positions, D] each.
    """
    from flash_attn.cute.interface import _flash_attn_bwd

    tile = tile_sizes(major, inputs.q.shape[3]).backward
    gradients = _empty_bshd(inputs.q), _empty_bshd(inputs.k), _empty_bshd(inputs.v)
    dq, dk, dv = _swap_heads_and_positions(*gradients)

    # Its programs own tiles of keys, so it takes the transposed lists.
    with device_guard(inputs.q):
        _flash_attn_bwd(
            *_swap_heads_and_positions(inputs.q, inputs.k, inputs.v, out, dout),
            lse,
            softmax_scale=inputs.scale,
            mask_mod=_mask_mod(inputs.document_bounds is not None),
            aux_tensors=_mask_tensors(inputs),
            block_sparse_tensors=_block_sparse_tensors(transposed_tile_lists(inputs, *tile), tile),
            dq=dq,
            dk=dk,
            dv=dv,
        )

    return gradients


def _swap_heads_and_positions(*tensors: Tensor) -> list[Tensor]:
    """Convert between [B, heads, positions, D] and the package's [B, positions, heads, D]."""
    return [x.transpose(1, 2) for x in tensors]


def _empty_bshd(like: Tensor) -> Tensor:
    """Allocate [B, heads, positions, D] in the memory order of [B, positions, heads, D]."""
    return like.new_empty(like.transpose(1, 2).shape).transpose(1, 2)


def _block_sparse_tensors(lists: TileLists, tile: tuple[int, int]) -> Any:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(*lists, block_size=tile)


def _mask_tensors(inputs: AttentionInputs) -> list[Tensor]:
    """Tensors that the mask reads: [high] without documents, else [low, high]."""
    low, high = _padded_key_ranges(inputs)
    return [high[0]] if inputs.document_bounds is None else [low, high]


@cache_per_mask
def _padded_key_ranges(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    # The forward kernel evaluates the mask for rows past the last query too: they must be readable.
    low, high = (F.pad(x, (0, MAX_TILE_ROWS)) for x in visible_key_ranges(inputs))
    return low, high


@functools.cache
def _mask_mod(has_documents: bool) -> Any:
    """Mask as a CuTe function. Cached, as the package compiles one kernel per function object."""
    import cutlass
    from cutlass import cute
    from flash_attn.cute.utils import scalar_to_ssa

    @cute.jit
    def in_block(batch, head, query, key, lengths, seen):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        return key < scalar_to_ssa(seen[0][query[0]], cutlass.Int32)

    @cute.jit
    def in_block_of_document(batch, head, query, key, lengths, seen):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        low = scalar_to_ssa(seen[0][batch[0], query[0]], cutlass.Int32)
        high = scalar_to_ssa(seen[1][batch[0], query[0]], cutlass.Int32)
        return (key >= low) & (key < high)

    return in_block_of_document if has_documents else in_block
