"""Block-causal attention by merging two exact parts: stock causal flash attention, and what a block's tokens see of its later ones.

A token sees all before it and, in its own block, those after it. The first is causal attention, for which every library has a
flash kernel; the second is the strict upper triangle of each m x m block, O(N m) numbers. Each part gives outputs and the log-sum-exp
of its scores; weighted by their shares of the common sum they add up to the whole softmax.

The backward is exact too: the flash backward recomputes its probabilities from the log-sum-exp that it is given, so with that of the
whole, and the whole output, it gives its part of the whole gradient; the triangle's part is added.

Legend: B batch, H query heads, G key-value heads, R = H / G, S queries, T keys, N blocks of queries, M tokens a block, D width.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FLASH: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Part(NamedTuple):
    """One call of flash attention: rows of the batch, queries, keys, and whether it is causal."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool


def merged_attention(q: Tensor, k: Tensor, v: Tensor, block: int, document_ids: Tensor | None, scale: float) -> Tensor:
    """As :func:`~bitlm_dist.kernels.attention.block_causal_attention`, for checked arguments on a CPU."""
    out: Tensor = _Merged.apply(q, k, v, block, document_ids, scale)
    return out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, block: int, document_ids: Tensor | None, scale: float) -> Tensor:
        past = k.shape[2] - q.shape[2]
        parts = list(_parts(q.shape[0], q.shape[2], past, document_ids))
        out, lse = _flash(q, k, v, parts, scale)
        if block > 1:
            triangle = _Triangle(q, k, v, block, document_ids, scale)
            out, lse = triangle.add(out, lse)
        ctx.save_for_backward(q, k, v, out, lse, document_ids)
        ctx.parts, ctx.block, ctx.scale = parts, block, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, out, lse, document_ids = ctx.saved_tensors
        (gradient,) = gradients
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for part in ctx.parts:
            at, keys = (part.rows, slice(None), part.queries), (part.rows, slice(None), part.keys)
            gq, gk, gv = FLASH_BACKWARD(gradient[at], q[at], k[keys], v[keys], out[at], lse[at], 0.0, part.causal, scale=ctx.scale)
            dq[at] += gq
            dk[keys] += gk
            dv[keys] += gv
        if ctx.block > 1:
            triangle = _Triangle(q, k, v, ctx.block, document_ids, ctx.scale)
            triangle.add_gradients(gradient, out, lse, dq, dk, dv)
        return dq, dk, dv, None, None, None


def _parts(rows: int, queries: int, past: int, document_ids: Tensor | None) -> Iterator[Part]:
    """Calls that together cover what causal attention inside documents sees; of each query its own document's comes first."""
    if document_ids is None:
        yield Part(slice(0, rows), slice(0, queries), slice(past, past + queries), True)
        if past:
            yield Part(slice(0, rows), slice(0, queries), slice(0, past), False)
        return
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    for row in range(rows):
        bounds = [0, *(changes[row].nonzero().flatten() + 1).tolist(), past + queries]
        for begin, end in zip(bounds, bounds[1:], strict=False):
            first = max(begin, past)
            if first >= end:
                continue
            own = slice(first - past, end - past)
            yield Part(slice(row, row + 1), own, slice(first, end), True)
            if begin < first:
                yield Part(slice(row, row + 1), own, slice(begin, first), False)


def _flash(q: Tensor, k: Tensor, v: Tensor, parts: list[Part], scale: float) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, S, D] and log-sum-exps [B, H, S] over all parts."""
    if len(parts) == 1:
        out, lse = FLASH(q, k[:, :, parts[0].keys], v[:, :, parts[0].keys], 0.0, parts[0].causal, scale=scale)
        return out, lse
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    for part in parts:
        at, keys = (part.rows, slice(None), part.queries), (part.rows, slice(None), part.keys)
        found, found_lse = FLASH(q[at], k[keys], v[keys], 0.0, part.causal, scale=scale)
        if part.causal:
            out[at], lse[at] = found, found_lse
        else:
            out[at], lse[at] = _merge(out[at], lse[at], found, found_lse)
    return out, lse


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.logaddexp(lse, other_lse)
    mine, theirs = (lse - both).exp_().unsqueeze(-1), (other_lse - both).exp_().unsqueeze(-1)
    return torch.addcmul(out * mine, other, theirs.to(out.dtype)).to(out.dtype), both


class _Triangle:
    """What tokens see of the later ones in their own block. All tensors are brought to [B, G, N, R M, …], R heads of a group as rows."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, block: int, document_ids: Tensor | None, scale: float) -> None:
        self._shape, self._groups, self._block, self._scale = q.shape, k.shape[1], block, scale
        self._blocks = -(-q.shape[2] // block)
        self._past = k.shape[2] - q.shape[2]
        self._q = self._rows(q)
        self._k, self._v = (self._columns(x[:, :, self._past :]) for x in (k, v))
        scores = (self._q.float() @ self._k.float().transpose(-1, -2)).mul_(scale)
        self._scores = self._split(scores).masked_fill_(self._hidden(document_ids), -math.inf)

    def _padded(self, x: Tensor, value: float = 0.0) -> Tensor:
        """Dimension 2 filled up to whole blocks."""
        missing = self._blocks * self._block - self._shape[2]
        return F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing), value=value) if missing else x

    def _rows(self, x: Tensor) -> Tensor:
        """[B, H, S, …] -> [B, G, N, R M, …]."""
        rest = x.shape[3:]
        cut = self._padded(x).reshape(x.shape[0], self._groups, -1, self._blocks, self._block, *rest)
        return cut.transpose(2, 3).reshape(x.shape[0], self._groups, self._blocks, -1, *rest)

    def _columns(self, x: Tensor) -> Tensor:
        """[B, G, S, D] -> [B, G, N, M, D]."""
        return self._padded(x).reshape(*x.shape[:2], self._blocks, self._block, x.shape[3])

    def _split(self, x: Tensor) -> Tensor:
        """[B, G, N, R M, M] -> [B, G, N, R, M, M]."""
        return x.unflatten(3, (-1, self._block))

    def _back(self, x: Tensor) -> Tensor:
        """[B, G, N, R M, …] -> [B, H, S, …]."""
        rest = x.shape[4:]
        whole = x.unflatten(3, (-1, self._block)).transpose(2, 3).reshape(self._shape[0], self._shape[1], -1, *rest)
        return whole[:, :, : self._shape[2]]

    def _hidden(self, document_ids: Tensor | None) -> Tensor:
        """Where a query (row) does not see a key (column): [1 or B, 1, N, 1, M, M]."""
        later = torch.ones(self._block, self._block, dtype=torch.bool, device=self._q.device).triu(1)
        place = torch.arange(self._blocks * self._block, device=self._q.device).view(1, 1, self._blocks, 1, 1, self._block)
        seen = later & (place < self._shape[2])
        if document_ids is not None:
            ids = self._padded(document_ids[:, None, self._past :].long(), value=-1).view(-1, 1, self._blocks, 1, self._block)
            seen = seen & (ids.unsqueeze(-1) == ids.unsqueeze(-2))
        return ~seen

    def _probabilities(self, lse: Tensor) -> Tensor:
        """Of the whole softmax: [B, G, N, R M, M]."""
        return (self._scores.flatten(3, 4) - self._rows(lse).unsqueeze(-1)).exp_()

    def add(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Merge with the outputs and log-sum-exps of the rest."""
        both = torch.logaddexp(lse, self._back(self._scores.flatten(3, 4).logsumexp(-1)))
        more = self._back(self._probabilities(both).to(out.dtype) @ self._v)
        return torch.addcmul(more, out, (lse - both).exp_().unsqueeze(-1).to(out.dtype)), both

    def add_gradients(self, gradient: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add this part's share of the gradients."""
        p, g = self._probabilities(lse), self._rows(gradient)
        delta = self._rows((gradient.float() * out.float()).sum(-1))
        ds = (g.float() @ self._v.float().transpose(-1, -2)).sub_(delta.unsqueeze(-1)).mul_(p).mul_(self._scale).to(g.dtype)
        dq += self._back(ds @ self._k)
        size = self._shape[2]
        dk[:, :, self._past :] += (ds.transpose(-1, -2) @ self._q).flatten(2, 3)[:, :, :size]
        dv[:, :, self._past :] += (p.to(g.dtype).transpose(-1, -2) @ g).flatten(2, 3)[:, :, :size]
