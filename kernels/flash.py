"""Causal flash attention within documents by torch's operators: the causal part of lse_merge.py.

The forward pass returns the output and the log-sum-exp of the scores. The backward pass takes both,
and they need not come from its own forward pass.

Legend: B batch, H query heads, G key-value heads, S queries, T keys, D head dimension.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitlm_dist.kernels.attention_inputs import AttentionInputs

Gradients = tuple[Tensor, Tensor, Tensor]  # dq, dk, dv
_CPU: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_GPU: Any = torch.ops.aten._flash_attention_forward
_GPU_BACKWARD: Any = torch.ops.aten._flash_attention_backward


def unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Reason why torch has no flash attention for this call; None if it has."""
    q = inputs.q
    if q.device.type == "cpu":
        return None  # supports everything

    if not q.is_cuda:
        return f"q is on {q.device}, it runs on CPU and CUDA devices"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q, k and v are {q.dtype}, on a GPU it supports torch.float16 and torch.bfloat16"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"head dim {q.shape[3]}, on a GPU it supports multiples of 8 up to 256"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the GPU has no flash attention, it needs compute capability 8.0"
    return None


def select_flash(inputs: AttentionInputs) -> "CPUFlash | GPUFlash":
    """Select the implementation for this call; it holds the state that its backward pass needs."""
    return GPUFlash(inputs) if inputs.q.is_cuda else CPUFlash(inputs)


class _FlashCall(NamedTuple):
    """One rectangle of a flash attention."""

    rows: slice  # of the batch
    queries: slice
    keys: slice
    is_causal: bool


class CPUFlash:
    """Flash attention of torch for CPUs: one call per document, and one for the keys before the
    first query.

    The last dimension of all inputs must be contiguous: otherwise the operator silently returns
    wrong results.
    """

    def __init__(self, inputs: AttentionInputs) -> None:
        self._calls = list(_flash_calls(inputs))

    def forward(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Compute causal attention within documents.

        Returns:
            out: [B, H, S, D].
            lse: log-sum-exp of the scores, [B, H, S], in fp32 or wider.
        """
        q = inputs.q
        k = inputs.k
        v = inputs.v
        if len(self._calls) == 1:
            return _CPU(q, k, v, 0.0, True, scale=inputs.scale)

        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for flash_call in self._calls:
            at = (flash_call.rows, slice(None), flash_call.queries)
            keys = (flash_call.rows, slice(None), flash_call.keys)
            result = _CPU(q[at], k[keys], v[keys], 0.0, flash_call.is_causal, scale=inputs.scale)

            # the causal call of a query comes first and writes what the others merge into
            out[at], lse[at] = (
                result if flash_call.is_causal else merge_by_lse(out[at], lse[at], *result)
            )

        return out, lse

    def backward(
        self, inputs: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor
    ) -> Gradients:
        """Compute the gradients of q, k and v from the given output and log-sum-exp."""
        q = inputs.q
        k = inputs.k
        v = inputs.v
        if dout.stride(-1) != 1:
            dout = dout.contiguous()

        if len(self._calls) == 1:
            return _CPU_BACKWARD(dout, q, k, v, out, lse, 0.0, True, scale=inputs.scale)

        dq = torch.zeros_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for flash_call in self._calls:
            at = (flash_call.rows, slice(None), flash_call.queries)
            keys = (flash_call.rows, slice(None), flash_call.keys)
            partial_grads = _CPU_BACKWARD(
                dout[at],
                q[at],
                k[keys],
                v[keys],
                out[at],
                lse[at],
                0.0,
                flash_call.is_causal,
                scale=inputs.scale,
            )

            # calls overlap in queries or keys, so their gradients add up
            for full_grad, index, partial_grad in zip(
                (dq, dk, dv), (at, keys, keys), partial_grads, strict=True
            ):
                full_grad[index] += partial_grad

        return dq, dk, dv


def _flash_calls(inputs: AttentionInputs) -> Iterator[_FlashCall]:
    """Split causal attention within documents into calls of flash attention.

    The causal call of a query comes before the one over its past keys.
    """
    num_past_keys = inputs.num_past_keys
    num_keys = inputs.k.shape[2]

    if inputs.document_bounds is None:
        rows = slice(0, len(inputs.q))
        yield _FlashCall(
            rows, slice(0, num_keys - num_past_keys), slice(num_past_keys, num_keys), True
        )
        if num_past_keys:
            yield _FlashCall(
                rows, slice(0, num_keys - num_past_keys), slice(0, num_past_keys), False
            )
        return

    for row, starts in enumerate(inputs.document_bounds[0]):
        for document_start, end in pairwise([*starts.unique_consecutive().tolist(), num_keys]):
            first = max(document_start, num_past_keys)
            if first >= end:
                continue  # a document without queries

            queries = slice(first - num_past_keys, end - num_past_keys)
            yield _FlashCall(slice(row, row + 1), queries, slice(first, end), True)
            if document_start < first:
                yield _FlashCall(slice(row, row + 1), queries, slice(document_start, first), False)


def merge_by_lse(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys.

    Args:
        out: output over the first set, [..., D].
        lse: log-sum-exp of its scores, [...].
        other: output over the second set, [..., D].
        other_lse: log-sum-exp of its scores, [...].

    Returns:
        out, lse: over both sets.
    """
    merged_lse = torch.logaddexp(lse, other_lse)
    weight = (lse - merged_lse).exp_().unsqueeze(-1)
    other_weight = (other_lse - merged_lse).exp_().unsqueeze(-1)
    return torch.addcmul(out * weight, other, other_weight.to(out.dtype)).to(out.dtype), merged_lse


class GPUFlash:
    """FlashAttention 2 of torch: documents by cumulative lengths, causal mask aligned to the bottom
    right corner.
    """

    def __init__(self, inputs: AttentionInputs) -> None:
        self._cu_seqlens_q = self._cu_seqlens_k = None  # without documents, no packing
        if inputs.document_bounds is not None:
            self._cu_seqlens_q, self._cu_seqlens_k = compute_cu_seqlens(
                inputs.document_bounds, inputs.num_past_keys
            )

        # the operator returns it and its backward requires it, though no dropout is used
        self._rng_state: list[Tensor] = []

    def _pack(self, *tensors: Tensor) -> list[Tensor]:
        """Convert [B, H, S, D] to [B, S, H, D], with documents to [B S, H, D]."""
        turned = [x.transpose(1, 2) for x in tensors]
        return turned if self._cu_seqlens_k is None else [x.flatten(0, 1) for x in turned]

    def _unpack(self, x: Tensor, batch: int) -> Tensor:
        return (x if self._cu_seqlens_k is None else x.unflatten(0, (batch, -1))).transpose(1, 2)

    def forward(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Compute causal attention within documents.

        Returns:
            out: [B, H, S, D].
            lse: log-sum-exp of the scores, fp32 [B, H, S].
        """
        batch = len(inputs.q)
        max_seqlen_q = inputs.q.shape[2]
        max_seqlen_k = inputs.k.shape[2]

        q, k, v = self._pack(inputs.q, inputs.k, inputs.v)
        out, lse, *self._rng_state, _ = _GPU(
            q, k, v, self._cu_seqlens_q, self._cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            0.0, True, False, scale=inputs.scale,
        )  # fmt: skip

        # packed sequences have the log-sum-exp [H, B S]
        if self._cu_seqlens_k is not None:
            lse = lse.unflatten(1, (batch, -1)).transpose(0, 1)

        return self._unpack(out, batch), lse

    def backward(
        self, inputs: AttentionInputs, dout: Tensor, out: Tensor, lse: Tensor
    ) -> Gradients:
        """Compute the gradients of q, k and v from the given output and log-sum-exp."""
        batch = len(inputs.q)
        max_seqlen_q = inputs.q.shape[2]
        max_seqlen_k = inputs.k.shape[2]

        g, q, k, v, o = self._pack(dout, inputs.q, inputs.k, inputs.v, out)
        if self._cu_seqlens_k is not None:
            lse = lse.transpose(0, 1).flatten(1)

        sizes = (self._cu_seqlens_q, self._cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        dq, dk, dv = _GPU_BACKWARD(
            g, q, k, v, o, lse.contiguous(), *sizes, 0.0, True, *self._rng_state, scale=inputs.scale
        )

        return self._unpack(dq, batch), self._unpack(dk, batch), self._unpack(dv, batch)


def compute_cu_seqlens(bounds: Tensor, num_past_keys: int) -> tuple[Tensor, Tensor]:
    """Cumulative lengths of all documents of the batch, one row after another.

    Waits for the GPU, as the number of documents decides a shape.

    Returns:
        cu_seqlens_q: int32 [documents + 1].
        cu_seqlens_k: int32 [documents + 1].
    """
    batch, keys = bounds.shape[1:]
    positions = torch.arange(keys, device=bounds.device)

    # a document before the first query has no queries, and length 0
    row, start = (bounds[0] == positions).nonzero(as_tuple=True)
    queries = (start - num_past_keys).clamp(min=0) + row * (keys - num_past_keys)

    ends = queries.new_tensor([batch])
    return (
        torch.cat((queries, ends * (keys - num_past_keys))).int(),
        torch.cat((start + row * keys, ends * keys)).int(),
    )
