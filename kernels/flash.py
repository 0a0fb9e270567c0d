"""Causal flash attention inside documents by what torch brings: the stock half of the merge (merge.py).

Forward gives the output and the log-sum-exp of the scores; backward takes both, which need not be its own forward's.

Legend: B batch, H query heads, G key-value heads, S queries, T keys, D width of a head.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from bitlm_dist.kernels.call import Call
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]
_CPU: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_GPU: Any = torch.ops.aten._flash_attention_forward
_GPU_BACKWARD: Any = torch.ops.aten._flash_attention_backward


def unsupported(call: Call) -> str | None:
    """Why no flash attention at hand takes the call; None if one does. That of the CPU takes all."""
    q = call.q
    if q.device.type == "cpu":
        return None
    if not q.is_cuda:
        return f"q is on {q.device}, it runs on CPU and CUDA devices"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q, k and v are {q.dtype}, on a GPU it supports torch.float16 and torch.bfloat16"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"heads of width {q.shape[3]}, on a GPU it supports multiples of 8 up to 256"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the GPU has no flash attention, it needs compute capability 8.0"
    return None


def flash_of(call: Call) -> "CPUFlash | GPUFlash":
    """The library for this call, with what its backward must know of its forward."""
    return GPUFlash(call) if call.q.is_cuda else CPUFlash(call)


class _Part(NamedTuple):
    """One call of flash attention: rows of the batch, queries, keys, and whether it is causal."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool


class CPUFlash:
    """torch's flash attention for CPUs: a call for each document, and one for the keys before the first query.

    It gives wrong numbers, silently, where the last dimension is not contiguous.
    """

    def __init__(self, call: Call) -> None:
        self._parts = list(_parts(call))

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """-> output [B, H, S, D], log-sum-exp [B, H, S] in fp32 or wider."""
        q, k, v = call.q, call.k, call.v
        if len(self._parts) == 1:
            return _CPU(q, k, v, 0.0, True, scale=call.scale)
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for part in self._parts:
            at, keys = (part.rows, slice(None), part.queries), (part.rows, slice(None), part.keys)
            found = _CPU(q[at], k[keys], v[keys], 0.0, part.causal, scale=call.scale)
            out[at], lse[at] = found if part.causal else merged(out[at], lse[at], *found)
        return out, lse

    def backward(self, call: Call, gradient: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """-> dq, dk, dv."""
        q, k, v = call.q, call.k, call.v
        if gradient.stride(-1) != 1:
            gradient = gradient.contiguous()
        if len(self._parts) == 1:
            return _CPU_BACKWARD(gradient, q, k, v, out, lse, 0.0, True, scale=call.scale)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for part in self._parts:
            at, keys = (part.rows, slice(None), part.queries), (part.rows, slice(None), part.keys)
            found = _CPU_BACKWARD(gradient[at], q[at], k[keys], v[keys], out[at], lse[at], 0.0, part.causal, scale=call.scale)
            for whole, place, share in zip((dq, dk, dv), (at, keys, keys), found, strict=True):
                whole[place] += share
        return dq, dk, dv


def _parts(call: Call) -> Iterator[_Part]:
    """Calls that together cover what causal attention inside documents sees; of each query its own document's comes first."""
    past, keys = call.past, call.k.shape[2]
    if call.bounds is None:
        rows = slice(0, len(call.q))
        yield _Part(rows, slice(0, keys - past), slice(past, keys), True)
        if past:
            yield _Part(rows, slice(0, keys - past), slice(0, past), False)
        return
    for row, starts in enumerate(call.bounds[0]):
        for begin, end in pairwise([*starts.unique_consecutive().tolist(), keys]):
            first = max(begin, past)
            if first >= end:
                continue
            own = slice(first - past, end - past)
            yield _Part(slice(row, row + 1), own, slice(first, end), True)
            if begin < first:
                yield _Part(slice(row, row + 1), own, slice(begin, first), False)


def merged(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps over two disjoint sets of keys -> those over both."""
    both = torch.logaddexp(lse, other_lse)
    mine, theirs = (lse - both).exp_().unsqueeze(-1), (other_lse - both).exp_().unsqueeze(-1)
    return torch.addcmul(out * mine, other, theirs.to(out.dtype)).to(out.dtype), both


class GPUFlash:
    """The flash attention 2 that torch brings: documents by cumulative lengths, causal from the bottom right corner."""

    def __init__(self, call: Call) -> None:
        self._queries = self._keys = None
        if call.bounds is not None:
            self._queries, self._keys = cumulative_lengths(call.bounds, call.past)
        self._random: list[Tensor] = []  # state of a dropout that is not used

    def _packed(self, *tensors: Tensor) -> list[Tensor]:
        """[B, H, S, D] -> [B, S, H, D], with documents [B S, H, D]."""
        turned = [x.transpose(1, 2) for x in tensors]
        return turned if self._keys is None else [x.flatten(0, 1) for x in turned]

    def _unpacked(self, x: Tensor, batch: int) -> Tensor:
        return (x if self._keys is None else x.unflatten(0, (batch, -1))).transpose(1, 2)

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """-> output [B, H, S, D], log-sum-exp fp32 [B, H, S]."""
        batch, queries, keys = len(call.q), call.q.shape[2], call.k.shape[2]
        q, k, v = self._packed(call.q, call.k, call.v)
        out, lse, *self._random, _ = _GPU(
            q, k, v, self._queries, self._keys, queries, keys, 0.0, True, False, scale=call.scale
        )  # fmt: skip
        if self._keys is not None:  # [H, B S]
            lse = lse.unflatten(1, (batch, -1)).transpose(0, 1)
        return self._unpacked(out, batch), lse

    def backward(self, call: Call, gradient: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """-> dq, dk, dv."""
        batch, queries, keys = len(call.q), call.q.shape[2], call.k.shape[2]
        g, q, k, v, o = self._packed(gradient, call.q, call.k, call.v, out)
        if self._keys is not None:
            lse = lse.transpose(0, 1).flatten(1)
        sizes = (self._queries, self._keys, queries, keys)
        dq, dk, dv = _GPU_BACKWARD(g, q, k, v, o, lse.contiguous(), *sizes, 0.0, True, *self._random, scale=call.scale)
        return self._unpacked(dq, batch), self._unpacked(dk, batch), self._unpacked(dv, batch)


def cumulative_lengths(bounds: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """Of all documents of the batch, one row after another: int32 [documents + 1] of queries and of keys. Waits for the GPU."""
    batch, keys = bounds.shape[1:]
    place = torch.arange(keys, device=bounds.device)
    row, start = (bounds[0] == place).nonzero(as_tuple=True)
    queries = (start - past).clamp(min=0) + row * (keys - past)
    ends = queries.new_tensor([batch])
    return (
        torch.cat((queries, ends * (keys - past))).int(),
        torch.cat((start + row * keys, ends * keys)).int(),
    )
