"""Block-causal attention by the project's own Triton kernels: exact, without atomics or an S x T
mask.

Forward and backward are torch operators, ``bitlm::block_causal_attention`` and ``..._backward``, so
torch.compile keeps its graph whole. The kernels read documents as the bounds of each token, 8 bytes
per token (attention_inputs.py).

Legend: B batch, H query heads, G key-value heads, S queries, T keys, D head dimension. S <= T: the
queries are the last S positions.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from bitlm_dist.kernels import triton_attention_kernels as kernels
from bitlm_dist.kernels.attention_inputs import AttentionInputs, device_guard
from bitlm_dist.kernels.tile_configs import (
    HEAD_DIMS,
    TileConfig,
    architecture_of,
    lookup_tile_configs,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# TRITON_INTERPRET=1: kernels run on CPU tensors
INTERPRETED = not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)


def unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Reason why these kernels do not support the call; None if they do."""
    q = inputs.q
    if q.shape[3] not in HEAD_DIMS:
        return f"head dim {q.shape[3]}, it supports {HEAD_DIMS}"
    if q.dtype not in DTYPES:
        return f"q, k and v are {q.dtype}, it supports {DTYPES}"
    if not q.is_cuda and not INTERPRETED:
        return f"q is on {q.device}, it needs a CUDA device"

    for name, x in (("q", q), ("k", inputs.k), ("v", inputs.v)):
        if x.stride(3) != 1:
            return f"{name} has strides {x.stride()}, its last dimension must be contiguous"

    return None


def attention(inputs: AttentionInputs) -> Tensor:
    """Compute block-causal attention; differentiable.

    Returns:
        [B, H, S, D] in the dtype of q and, if q is dense, with its strides.
    """
    return attention_with_lse(inputs)[0]


def attention_with_lse(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Compute block-causal attention and the log-sum-exp of its scores; both differentiable.

    Returns:
        out: as from :func:`attention`.
        lse: natural log-sum-exp, fp32 [B, H, S].
    """
    bounds = None if inputs.document_bounds is None else inputs.document_bounds.contiguous()
    return _attention(inputs.q, inputs.k, inputs.v, bounds, inputs.block, inputs.scale)


@torch.library.custom_op("bitlm::block_causal_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(q)
    if q.numel():
        tile = lookup_tile_configs(
            architecture_of(q.device), q.shape[3], q.dtype == torch.float32
        ).forward
        arguments = (
            q,
            k,
            v,
            out,
            lse,
            *_starts_and_ends(bounds),
            *_strides(q, k, v, out),
            *_sizes(q, k, block, scale),
        )

        # one program per tile of queries and head
        _launch(
            kernels.forward_kernel,
            q,
            triton.cdiv(q.shape[2], tile.num_queries) * q.shape[0] * q.shape[1],
            arguments,
            tile,
            bounds,
        )

    return out, lse


@_attention.register_fake
def _empty_outputs(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
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
        return dq, dk.zero_(), dv.zero_()  # there may be keys without a query

    # the sum of an output, for example, has a gradient with stride 0
    dout = dout if dout.stride(3) == 1 else dout.contiguous()
    delta = torch.empty_like(lse)
    documents = _starts_and_ends(bounds)
    sizes = _sizes(q, k, block, scale)
    tile = lookup_tile_configs(architecture_of(q.device), q.shape[3], q.dtype == torch.float32)

    # dq comes first: its kernel writes delta, which the one for dk and dv reads
    arguments = (
        q,
        k,
        v,
        out,
        dout,
        lse,
        dlse,
        delta,
        dq,
        *documents,
        *_strides(q, k, v, out, dout, dq),
        *sizes,
    )
    num_programs = triton.cdiv(q.shape[2], tile.dq.num_queries) * q.shape[0] * q.shape[1]
    _launch(kernels.dq_kernel, q, num_programs, arguments, tile.dq, bounds)

    arguments = (
        q,
        k,
        v,
        dout,
        lse,
        delta,
        dk,
        dv,
        *documents,
        *_strides(q, k, v, dout, dk, dv),
        *sizes,
    )
    num_programs = triton.cdiv(k.shape[2], tile.dkv.num_keys) * k.shape[0] * k.shape[1]
    _launch(kernels.dkv_kernel, q, num_programs, arguments, tile.dkv, bounds)

    return dq, dk, dv


@_attention_backward.register_fake
def _empty_gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, ctx.block, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, bounds, *output)
    ctx.set_materialize_grads(False)  # most callers do not use lse: allocate no zeros for it


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bounds, out, lse = ctx.saved_tensors

    # either output may have no gradient
    if dout is None:
        if dlse is None:
            return (None,) * 6
        dout = torch.zeros_like(out)
    dlse = None if dlse is None else dlse.contiguous()

    gradients = _attention_backward(dout, dlse, q, k, v, out, lse, bounds, ctx.block, ctx.scale)
    return *gradients, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _starts_and_ends(bounds: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if bounds is None else (bounds[0], bounds[1])


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _sizes(q: Tensor, k: Tensor, block: int, scale: float) -> tuple[float, int, int, int, int, int]:
    return scale, block, q.shape[2], k.shape[2], q.shape[1], q.shape[1] // k.shape[1]


def _launch(
    kernel: Any,
    q: Tensor,
    num_programs: int,
    arguments: tuple[Any, ...],
    tile: TileConfig,
    bounds: Tensor | None,
) -> None:
    with device_guard(q):
        kernel[(num_programs,)](
            *arguments,
            width=q.shape[3],
            tile_queries=tile.num_queries,
            tile_keys=tile.num_keys,
            documents=bounds is not None,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
