"""Block-causal attention by the project's own Triton kernels: forward and backward, exact, no atomics, no S x T mask.

Forward and backward are operators of torch, ``bitlm::block_causal_attention`` and ``..._backward``: torch.compile keeps its graph
whole around them. Documents reach the kernels as the bounds of their tokens, 8 bytes each (call.py).

Legend: B batch, H query heads, G key-value heads, S queries, T keys, D width of a head. S <= T: queries are the last S positions.
"""

from typing import Any

import torch
import triton
from bitlm_dist.kernels import triton_attention_kernels as kernels
from bitlm_dist.kernels.call import Call, on_device_of
from bitlm_dist.kernels.tiles import WIDTHS, Tile, architecture_of, tiles
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1: tensors of the CPU


def unsupported(call: Call) -> str | None:
    """Why these kernels do not take the call; None if they do."""
    q = call.q
    if q.shape[3] not in WIDTHS:
        return f"heads of width {q.shape[3]}, it supports {WIDTHS}"
    if q.dtype not in DTYPES:
        return f"q, k and v are {q.dtype}, it supports {DTYPES}"
    if not q.is_cuda and not INTERPRETED:
        return f"q is on {q.device}, it needs a CUDA device"
    for name, x in (("q", q), ("k", call.k), ("v", call.v)):
        if x.stride(3) != 1:
            return f"{name} has strides {x.stride()}, its last dimension must be contiguous"
    return None


def attention(call: Call) -> Tensor:
    """[B, H, S, D] in the dtype of q and, where q is dense, in its strides; differentiable."""
    return attention_with_lse(call)[0]


def attention_with_lse(call: Call) -> tuple[Tensor, Tensor]:
    """As :func:`attention`, with the natural log-sum-exp of the scores, fp32 [B, H, S]; both are differentiable."""
    bounds = None if call.bounds is None else call.bounds.contiguous()
    return _attention(call.q, call.k, call.v, bounds, call.block, call.scale)


@torch.library.custom_op("bitlm::block_causal_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, block: int, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _empty_results(q)
    if q.numel():
        tile = tiles(architecture_of(q.device), q.shape[3], q.dtype == torch.float32).forward
        arguments = (q, k, v, out, lse, *_rows_of(bounds), *_strides(q, k, v, out), *_sizes(q, k, block, scale))
        _launch(kernels.forward_kernel, q, triton.cdiv(q.shape[2], tile.queries) * q.shape[0] * q.shape[1], arguments, tile, bounds)
    return out, lse


@_attention.register_fake
def _empty_results(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("bitlm::block_causal_attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor | None,
    block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _empty_gradients(dout, dlse, q, k, v)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    dout = dout if dout.stride(3) == 1 else dout.contiguous()
    delta = torch.empty_like(lse)
    documents, sizes = _rows_of(bounds), _sizes(q, k, block, scale)
    tile = tiles(architecture_of(q.device), q.shape[3], q.dtype == torch.float32)
    arguments = (q, k, v, out, dout, lse, dlse, delta, dq, *documents, *_strides(q, k, v, out, dout, dq), *sizes)
    programs = triton.cdiv(q.shape[2], tile.dq.queries) * q.shape[0] * q.shape[1]
    _launch(kernels.dq_kernel, q, programs, arguments, tile.dq, bounds)
    arguments = (q, k, v, dout, lse, delta, dk, dv, *documents, *_strides(q, k, v, dout, dk, dv), *sizes)
    programs = triton.cdiv(k.shape[2], tile.dkv.keys) * k.shape[0] * k.shape[1]
    _launch(kernels.dkv_kernel, q, programs, arguments, tile.dkv, bounds)
    return dq, dk, dv


@_attention_backward.register_fake
def _empty_gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, ctx.block, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bounds, *output)
    ctx.set_materialize_grads(False)  # most callers use no lse: no zeros for it


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bounds, out, lse = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * 6
        dout = torch.zeros_like(out)
    dlse = None if dlse is None else dlse.contiguous()
    gradients = _attention_backward(dout, dlse, q, k, v, out, lse, bounds, ctx.block, ctx.scale)
    return *gradients, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def _rows_of(bounds: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if bounds is None else (bounds[0], bounds[1])


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _sizes(q: Tensor, k: Tensor, block: int, scale: float) -> tuple[float, int, int, int, int, int]:
    return scale, block, q.shape[2], k.shape[2], q.shape[1], q.shape[1] // k.shape[1]


def _launch(kernel: Any, q: Tensor, programs: int, arguments: tuple[Any, ...], tile: Tile, bounds: Tensor | None) -> None:
    with on_device_of(q):
        kernel[(programs,)](
            *arguments,
            width=q.shape[3],
            tile_queries=tile.queries,
            tile_keys=tile.keys,
            documents=bounds is not None,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
