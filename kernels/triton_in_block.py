"""In-block attention by the project's own Triton kernels: forward and backward, each in one pass
over memory.

A program takes as many whole blocks of one head as fit in 64 rows. It multiplies them as one tile
in which only the blocks on the diagonal count. Every element is read once and written once: the
forward pass saves nothing, and the backward pass recomputes the weights.

Legend: N blocks, M tokens per block, R = N·M rows, H heads, D head dimension.
"""

# Triton reads annotations as types of kernel arguments, so only constexprs have one.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitlm_dist.kernels.attention_inputs import device_guard

TILE_ROWS = 64  # the fewest that one tensor-core instruction of Hopper multiplies
NUM_WARPS = 4
MAX_HEAD_DIM = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ["scale", "rows", "heads"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _row_pointers(
    pointer, inside, stride, width: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr
):
    """Addresses [tile, padded] of the rows from ``pointer`` on, and the mask of the valid ones."""
    row = tl.arange(0, tile)
    column = tl.arange(0, padded)
    if padded > width:
        inside = inside & (column < width)[None, :]
    return pointer + (row[:, None] * stride + column[None, :]), inside


@triton.jit
def _load(pointer, inside, stride, width: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr):
    pointers, inside = _row_pointers(pointer, inside, stride, width, padded, tile)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store(
    pointer, x, inside, stride, width: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr
):
    pointers, inside = _row_pointers(pointer, inside, stride, width, padded, tile)
    tl.store(pointers, x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_weights(q, k, scale, block: tl.constexpr, causal: tl.constexpr, tile: tl.constexpr):
    """Softmax over each row's block, fp32 [tile, tile]."""
    query = tl.arange(0, tile)[:, None]
    key = tl.arange(0, tile)[None, :]
    visible = query // block == key // block
    if causal:
        visible = visible & (key <= query)

    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    scores = tl.where(visible, scores, float("-inf"))

    # every row attends to itself, so its maximum is finite
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    qkv, out, stride_r, stride_p, stride_h, stride_or, stride_oh, scale, rows, heads,
    block: tl.constexpr, causal: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
    tile: tl.constexpr,
):  # fmt: skip
    """Compute out [R, H, D] from qkv [R, 3, H, D].

    Each program computes as many whole blocks of one head as fit in one tile.
    """
    used: tl.constexpr = tile // block * block
    program = tl.program_id(0)
    h = (program % heads).to(tl.int64)
    first = (program // heads).to(tl.int64) * used
    row = tl.arange(0, tile)
    inside = ((row < used) & (first + row < rows))[:, None]

    qkv += first * stride_r + h * stride_h
    q = _load(qkv, inside, stride_r, width, padded, tile)
    k = _load(qkv + stride_p, inside, stride_r, width, padded, tile)
    v = _load(qkv + 2 * stride_p, inside, stride_r, width, padded, tile)

    weights = _softmax_weights(q, k, scale, block, causal, tile)
    mixed = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    _store(out + first * stride_or + h * stride_oh, mixed, inside, stride_or, width, padded, tile)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    qkv, dout, dqkv, stride_r, stride_p, stride_h, stride_gr, stride_gh,
    stride_dr, stride_dp, stride_dh, scale, rows, heads,
    block: tl.constexpr, causal: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
    tile: tl.constexpr,
):  # fmt: skip
    """Compute dqkv [R, 3, H, D] from qkv [R, 3, H, D] and dout [R, H, D].

    Programs are as in :func:`forward_kernel`.
    """
    used: tl.constexpr = tile // block * block
    program = tl.program_id(0)
    h = (program % heads).to(tl.int64)
    first = (program // heads).to(tl.int64) * used
    row = tl.arange(0, tile)
    inside = ((row < used) & (first + row < rows))[:, None]

    qkv += first * stride_r + h * stride_h
    dqkv += first * stride_dr + h * stride_dh
    q = _load(qkv, inside, stride_r, width, padded, tile)
    k = _load(qkv + stride_p, inside, stride_r, width, padded, tile)
    v = _load(qkv + 2 * stride_p, inside, stride_r, width, padded, tile)
    g = _load(dout + first * stride_gr + h * stride_gh, inside, stride_gr, width, padded, tile)

    # the forward pass saved no weights
    weights = _softmax_weights(q, k, scale, block, causal, tile)
    dv = tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision="ieee")
    _store(dqkv + 2 * stride_dp, dv, inside, stride_dr, width, padded, tile)

    # softmax backward: dS = P * (dP - sum(P * dP))
    dweights = tl.dot(g, tl.trans(v), input_precision="ieee")
    dscores = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
    dscores = dscores.to(q.dtype)

    _store(
        dqkv,
        tl.dot(dscores, k, input_precision="ieee") * scale,
        inside,
        stride_dr,
        width,
        padded,
        tile,
    )
    dk = tl.dot(tl.trans(dscores), q, input_precision="ieee") * scale
    _store(dqkv + stride_dp, dk, inside, stride_dr, width, padded, tile)


# TRITON_INTERPRET=1: kernels run on CPU tensors
INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)


def unsupported_reason(qkv: Tensor) -> str | None:
    """Reason why these kernels do not support qkv [..., M, 3, H, D]; None if they do."""
    if qkv.shape[-4] > TILE_ROWS:
        return f"blocks of {qkv.shape[-4]} tokens, it supports up to {TILE_ROWS}"
    if qkv.shape[-1] > MAX_HEAD_DIM:
        return f"head dim {qkv.shape[-1]}, it supports up to {MAX_HEAD_DIM}"
    if qkv.dtype not in DTYPES:
        return f"qkv is {qkv.dtype}, it supports {DTYPES}"
    if not qkv.is_cuda and not INTERPRETED:
        return f"qkv is on {qkv.device}, it needs a CUDA device"
    return None


def attention(qkv: Tensor, causal: bool) -> Tensor:
    """Compute attention within each block; differentiable.

    Args:
        qkv: [..., M, 3, H, D]. It is not copied if the leading dimensions have one common stride
            and the last dimension is contiguous.
        causal: if True, a token does not attend to later tokens of its block.

    Returns:
        [..., M, H, D], contiguous.
    """
    return _attention(qkv, causal)


@torch.library.custom_op("bitlm::in_block_attention", mutates_args=())
def _attention(qkv: Tensor, causal: bool) -> Tensor:
    out = _empty_output(qkv, causal)
    if qkv.numel():
        packed = _flatten_leading_dims(qkv, 4)
        flat = out.view(-1, *out.shape[-2:])
        strides = (*packed.stride()[:3], *flat.stride()[:2])
        _launch(forward_kernel, (packed, flat, *strides), qkv, causal)
    return out


@_attention.register_fake
def _empty_output(qkv: Tensor, causal: bool) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-3], *qkv.shape[-2:]))


@torch.library.custom_op("bitlm::in_block_attention_backward", mutates_args=())
def _attention_backward(dout: Tensor, qkv: Tensor, causal: bool) -> Tensor:
    dqkv = _empty_dqkv(dout, qkv, causal)
    if qkv.numel():
        packed = _flatten_leading_dims(qkv, 4)
        flat = dqkv.view(-1, *qkv.shape[-3:])
        g = _flatten_leading_dims(dout, 3)
        strides = (*packed.stride()[:3], *g.stride()[:2], *flat.stride()[:3])
        _launch(backward_kernel, (packed, g, flat, *strides), qkv, causal)
    return dqkv


@_attention_backward.register_fake
def _empty_dqkv(dout: Tensor, qkv: Tensor, causal: bool) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    qkv, ctx.causal = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return _attention_backward(dout, *ctx.saved_tensors, ctx.causal), None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _flatten_leading_dims(x: Tensor, num_dims: int) -> Tensor:
    """Merge all leading dimensions, as a view if their strides allow it; the last dimension becomes
    contiguous.
    """
    x = x.reshape(-1, *x.shape[x.dim() - num_dims + 1 :])
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(kernel: Any, arguments: tuple[Any, ...], qkv: Tensor, causal: bool) -> None:
    block, _, heads, head_dim = qkv.shape[-4:]
    num_rows = qkv.numel() // (3 * heads * head_dim)

    # a tile holds whole blocks only
    num_programs = triton.cdiv(num_rows, TILE_ROWS // block * block) * heads

    with device_guard(qkv):
        kernel[(num_programs,)](
            *arguments,
            1 / math.sqrt(head_dim),
            num_rows,
            heads,
            block=block,
            causal=causal,
            width=head_dim,
            padded=max(16, triton.next_power_of_2(head_dim)),  # as tl.dot requires
            tile=TILE_ROWS,
            num_warps=NUM_WARPS,
        )
