"""Block-causal attention by the project's own Triton kernels: forward and backward, exact, no atomics, no S x T mask.

Forward and backward are operators of torch, ``bitlm::block_causal_attention`` and ``..._backward``: torch.compile keeps its graph
whole around them. Documents reach the kernels as the bounds of :func:`bounds_of_documents`, 8 bytes a token.

Legend: B batch, H query heads, G key-value heads, S queries, T keys, D width of a head. S <= T: queries are the last S positions.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from bitlm_dist.kernels import triton_attention_kernels as kernels
from bitlm_dist.kernels.tiles import WIDTHS, Tile, architecture_of, tiles
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1: tensors of the CPU


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    document_ids: Tensor | None = None,
    document_bounds: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention with full sight inside a block of ``block`` tokens and causal sight across blocks; differentiable.

    Args:
        q: [B, H, S, D]; any strides but a contiguous last dimension, also for k and v.
        k: [B, G, T, D], H a multiple of G.
        v: [B, G, T, D].
        block: m >= 1; T - S must be a multiple of it, the last block may be incomplete.
        document_ids: [B, T] integers; a token sees only its own document. A document is a run of equal ids: the same id after
            another one is another document.
        document_bounds: what :func:`bounds_of_documents` makes of them, to be computed once for all layers.
        scale: factor on the scores, positive, 1/sqrt(D) by default.

    Returns:
        [B, H, S, D] in the dtype of q and, where q is dense, in its strides.

    Raises:
        ValueError: :func:`unsupported` says why.
    """
    return attention_with_lse(
        q, k, v, block=block, document_ids=document_ids, document_bounds=document_bounds, scale=scale
    )[0]  # fmt: skip


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    document_ids: Tensor | None = None,
    document_bounds: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`block_causal_attention`, with the natural log-sum-exp of the scores, fp32 [B, H, S]; both are differentiable."""
    if document_ids is not None:
        if document_bounds is not None:
            raise ValueError("document_ids and document_bounds are both given: they say the same, give one")
        if document_ids.shape != (k.shape[0], k.shape[-2]):
            raise ValueError(f"document_ids {(*document_ids.shape,)}: expected [B, T] = {(k.shape[0], k.shape[-2])}")
        document_bounds = bounds_of_documents(document_ids)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    reason = unsupported(q, k, v, block, document_bounds, scale)
    if reason is not None:
        raise ValueError(reason)
    return _attention(q, k, v, document_bounds, block, scale)


def bounds_of_documents(document_ids: Tensor) -> Tensor:
    """Document ids [B, T] -> int32 [2, B, T]: first position of each token's document, and the one after its last."""
    batch, keys = document_ids.shape
    place = torch.arange(keys, device=document_ids.device, dtype=torch.int32).expand(batch, -1)
    edge = torch.ones(batch, 1, dtype=torch.bool, device=document_ids.device)
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    starts = place.where(torch.cat((edge, changes), 1), 0).cummax(1).values
    ends = (place + 1).where(torch.cat((changes, edge), 1), keys).flip(1).cummin(1).values.flip(1)
    return torch.stack((starts, ends)).int()


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, block: int, document_bounds: Tensor | None = None, scale: float = 1.0
) -> str | None:
    """Why these kernels do not take such arguments and which back end does; None if they do. Reads no numbers of the tensors."""
    shapes = f"q {(*q.shape,)}, k {(*k.shape,)}, v {(*v.shape,)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        return f"{shapes}: expected q [B,H,S,D] and k, v [B,G,T,D]"
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        return f"{shapes}: batch and head width must be equal, and H a multiple of G"
    if block < 1:
        return f"block = {block}: a block holds at least one token"
    if k.shape[2] < q.shape[2] or (k.shape[2] - q.shape[2]) % block:
        return f"{k.shape[2]} keys before {q.shape[2]} queries: T - S must be a multiple of block = {block}"
    if q.shape[3] not in WIDTHS:
        return f"head width {q.shape[3]}: the Triton kernels support {WIDTHS}; backend='sdpa' takes any"
    if not scale > 0:
        return f"scale = {scale}: the Triton kernels need a positive one; backend='sdpa' takes any"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            return f"{name} is {x.dtype}: the Triton kernels support {DTYPES}; backend='reference' takes any"
        if x.dtype != q.dtype or x.device != q.device:
            return f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: all three must agree, in every back end"
        if x.stride(3) != 1:
            return f"{name} has strides {x.stride()}: the last dimension must be contiguous; backend='sdpa' takes any strides"
    if not q.is_cuda and not INTERPRETED and q.device.type != "meta":
        return f"q is on {q.device}: the Triton kernels need a CUDA device; backend='sdpa' runs anywhere"
    return None if document_bounds is None else _unsupported_bounds(document_bounds, k)


def _unsupported_bounds(bounds: Tensor, k: Tensor) -> str | None:
    expected = (2, k.shape[0], k.shape[2])
    if bounds.shape != expected or bounds.dtype != torch.int32 or not bounds.is_contiguous():
        return f"document_bounds {(*bounds.shape,)} {bounds.dtype}: expected contiguous int32 [2, B, T] = {expected}"
    if bounds.device != k.device:
        return f"document_bounds is on {bounds.device}, k on {k.device}"
    return None


@torch.library.custom_op("bitlm::block_causal_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, block: int, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _empty_results(q, k, v, bounds, block, scale)
    if q.numel():
        tile = tiles(architecture_of(q.device), q.shape[3], q.dtype == torch.float32).forward
        arguments = (q, k, v, out, lse, *_rows_of(bounds), *_strides(q, k, v, out), *_sizes(q, k, block, scale))
        _launch(kernels.forward_kernel, q, triton.cdiv(q.shape[2], tile.queries) * q.shape[0] * q.shape[1], arguments, tile, bounds)
    return out, lse


@_attention.register_fake
def _empty_results(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, block: int, scale: float) -> tuple[Tensor, Tensor]:
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
    dq, dk, dv = _empty_gradients(dout, dlse, q, k, v, out, lse, bounds, block, scale)
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
    # Triton starts kernels on the current device, which need not be the tensors'.
    device: AbstractContextManager[Any] = torch.cuda.device(q.device) if q.is_cuda else nullcontext()
    with device:
        kernel[(programs,)](
            *arguments,
            width=q.shape[3],
            tile_queries=tile.queries,
            tile_keys=tile.keys,
            documents=bounds is not None,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
