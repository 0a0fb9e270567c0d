"""Attention inside each block of m tokens by the project's own Triton kernels: forward and backward, one pass over memory each.

A program takes as many whole blocks of one head as fit in 64 rows and multiplies them as one tile of which only the blocks on the
diagonal count. Every number is read once and written once: the forward saves nothing, and the backward computes the weights again.

Legend: N blocks, M tokens a block, R = N·M rows, H heads, D width of a head.
"""

# Triton reads annotations as the types of a kernel's arguments.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

import math
from typing import Any

import torch
import triton
import triton.language as tl
from bitlm_dist.kernels.call import on_device_of
from torch import Tensor

ROWS = 64  # of a tile: the fewest that Hopper's tensor cores multiply at once
WARPS = 4
MAX_WIDTH = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ["scale", "rows", "heads"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _places(pointer, inside, stride, width: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr):
    """Addresses [tile, padded] of the rows from ``pointer`` on, and which of them are inside and within the width of the head."""
    row = tl.arange(0, tile)
    column = tl.arange(0, padded)
    if padded > width:
        inside = inside & (column < width)[None, :]
    return pointer + (row[:, None] * stride + column[None, :]), inside


@triton.jit
def _load(pointer, inside, stride, width: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr):
    places, inside = _places(pointer, inside, stride, width, padded, tile)
    return tl.load(places, mask=inside, other=0.0)


@triton.jit
def _store(pointer, x, inside, stride, width: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr):
    places, inside = _places(pointer, inside, stride, width, padded, tile)
    tl.store(places, x.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _weights(q, k, scale, block: tl.constexpr, causal: tl.constexpr, tile: tl.constexpr):
    """Softmax over each row's block, fp32 [tile, tile]. Every row sees itself, so none is empty."""
    query = tl.arange(0, tile)[:, None]
    key = tl.arange(0, tile)[None, :]
    visible = query // block == key // block
    if causal:
        visible = visible & (key <= query)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    scores = tl.where(visible, scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    qkv, out, stride_r, stride_p, stride_h, stride_or, stride_oh, scale, rows, heads,
    block: tl.constexpr, causal: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """qkv [R, 3, H, D] -> out [R, H, D]: the whole blocks that fit in one tile, of one head."""
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
    weights = _weights(q, k, scale, block, causal, tile)
    mixed = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    _store(out + first * stride_or + h * stride_oh, mixed, inside, stride_or, width, padded, tile)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    qkv, dout, dqkv, stride_r, stride_p, stride_h, stride_gr, stride_gh, stride_dr, stride_dp, stride_dh, scale, rows, heads,
    block: tl.constexpr, causal: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """qkv [R, 3, H, D] and dout [R, H, D] -> dqkv."""
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
    weights = _weights(q, k, scale, block, causal, tile)
    dv = tl.dot(tl.trans(weights.to(g.dtype)), g, input_precision="ieee")
    _store(dqkv + 2 * stride_dp, dv, inside, stride_dr, width, padded, tile)
    dweights = tl.dot(g, tl.trans(v), input_precision="ieee")
    dscores = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
    dscores = dscores.to(q.dtype)
    _store(dqkv, tl.dot(dscores, k, input_precision="ieee") * scale, inside, stride_dr, width, padded, tile)
    dk = tl.dot(tl.trans(dscores), q, input_precision="ieee") * scale
    _store(dqkv + stride_dp, dk, inside, stride_dr, width, padded, tile)


INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1: tensors of the CPU


def unsupported(qkv: Tensor) -> str | None:
    """Why these kernels do not take qkv [..., M, 3, H, D]; None if they do."""
    if qkv.shape[-4] > ROWS:
        return f"blocks of {qkv.shape[-4]} tokens, it supports up to {ROWS}"
    if qkv.shape[-1] > MAX_WIDTH:
        return f"heads of width {qkv.shape[-1]}, it supports up to {MAX_WIDTH}"
    if qkv.dtype not in DTYPES:
        return f"qkv is {qkv.dtype}, it supports {DTYPES}"
    if not qkv.is_cuda and not INTERPRETED:
        return f"qkv is on {qkv.device}, it needs a CUDA device"
    return None


def attention(qkv: Tensor, causal: bool) -> Tensor:
    """[..., M, 3, H, D] -> [..., M, H, D], contiguous; differentiable.

    Read without a copy where the tokens of all blocks lie at equal distances and the last dimension is contiguous.
    """
    return _attention(qkv, causal)


@torch.library.custom_op("bitlm::in_block_attention", mutates_args=())
def _attention(qkv: Tensor, causal: bool) -> Tensor:
    out = _empty_out(qkv, causal)
    if qkv.numel():
        packed = _as_rows(qkv, 4)
        flat = out.view(-1, *out.shape[-2:])
        strides = (*packed.stride()[:3], *flat.stride()[:2])
        _launch(forward_kernel, (packed, flat, *strides), qkv, causal)
    return out


@_attention.register_fake
def _empty_out(qkv: Tensor, causal: bool) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-3], *qkv.shape[-2:]))


@torch.library.custom_op("bitlm::in_block_attention_backward", mutates_args=())
def _attention_backward(dout: Tensor, qkv: Tensor, causal: bool) -> Tensor:
    dqkv = _empty_dqkv(dout, qkv, causal)
    if qkv.numel():
        packed, flat = _as_rows(qkv, 4), dqkv.view(-1, *qkv.shape[-3:])
        g = _as_rows(dout, 3)
        strides = (*packed.stride()[:3], *g.stride()[:2], *flat.stride()[:3])
        _launch(backward_kernel, (packed, g, flat, *strides), qkv, causal)
    return dqkv


@_attention_backward.register_fake
def _empty_dqkv(dout: Tensor, qkv: Tensor, causal: bool) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    qkv, ctx.causal = inputs
    ctx.save_for_backward(qkv)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return _attention_backward(dout, *ctx.saved_tensors, ctx.causal), None


_attention.register_autograd(_differentiate, setup_context=_save)


def _as_rows(x: Tensor, dims: int) -> Tensor:
    """All leading dimensions as one, a view if their strides allow it; the last dimension contiguous."""
    x = x.reshape(-1, *x.shape[x.dim() - dims + 1 :])
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(kernel: Any, arguments: tuple[Any, ...], qkv: Tensor, causal: bool) -> None:
    block, _, heads, width = qkv.shape[-4:]
    rows = qkv.numel() // (3 * heads * width)
    programs = triton.cdiv(rows, ROWS // block * block) * heads
    with on_device_of(qkv):
        kernel[(programs,)](
            *arguments,
            1 / math.sqrt(width),
            rows,
            heads,
            block=block,
            causal=causal,
            width=width,
            padded=max(16, triton.next_power_of_2(width)),
            tile=ROWS,
            num_warps=WARPS,
        )
