"""Block-causal attention by merging two exact parts: stock causal flash attention, and what a block's tokens see of its later ones.

A token sees all before it and, in its own block, those after it. The first is causal attention, for which every library has a
flash kernel (flash.py); the second is the strict upper triangle of each m x m block, O(S m) numbers. Each part gives outputs and
the log-sum-exp of its scores; weighted by their shares of the common sum they add up to the whole softmax.

The backward is exact too: a flash backward computes its probabilities again from the log-sum-exp that it is given, so with that of
the whole, and the whole output, it gives its part of the whole gradient; the triangle's part is added.

Legend: B batch, H query heads, G key-value heads, R = H / G, S queries, T keys, N blocks of queries, M tokens a block, D width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from bitlm_dist.kernels.call import Call
from bitlm_dist.kernels.flash import flash_of, unsupported
from torch import Tensor

__all__ = ["attention", "unsupported"]


def attention(call: Call) -> Tensor:
    """[B, H, S, D], differentiable."""
    out: Tensor = _Merged.apply(call.q, call.k, call.v, call)
    return out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        call = call.of(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)))
        ctx.flash = flash_of(call)
        out, lse = ctx.flash.forward(call)
        if call.block > 1:
            out, lse = _Triangle(call).add(out, lse)
        ctx.save_for_backward(call.q, call.k, call.v, out, lse, call.bounds)
        ctx.block, ctx.scale = call.block, call.scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, out, lse, bounds = ctx.saved_tensors
        (gradient,) = gradients
        call = Call(q, k, v, ctx.block, bounds, ctx.scale)
        found = ctx.flash.backward(call, gradient, out, lse)
        if call.block > 1:
            _Triangle(call).add_gradients(gradient, out, lse, *found)
        return *found, None


class _Triangle:
    """What tokens see of the later ones in their own block; tensors are [B, G, N, R M, …], the R heads of a group as rows."""

    def __init__(self, call: Call) -> None:
        self._shape, self._groups, self._block, self._scale = call.q.shape, call.k.shape[1], call.block, call.scale
        self._blocks = -(-call.q.shape[2] // call.block)
        self._past = call.past
        self._number = torch.promote_types(call.q.dtype, torch.float32)  # of scores and weights
        self._q = self._rows(call.q)
        self._k, self._v = (self._columns(x[:, :, self._past :]) for x in (call.k, call.v))
        scores = (self._q.to(self._number) @ self._k.to(self._number).mT).mul_(call.scale)
        self._scores = self._split(scores).masked_fill_(self._hidden(call.bounds), -math.inf)

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

    def _hidden(self, bounds: Tensor | None) -> Tensor:
        """Where a query (row) does not see a key (column): [1 or B, 1, N, 1, M, M]."""
        later = torch.ones(self._block, self._block, dtype=torch.bool, device=self._q.device).triu(1)
        place = torch.arange(self._blocks * self._block, device=self._q.device).view(1, 1, self._blocks, 1, 1, self._block)
        if bounds is None:
            return ~(later & (place < self._shape[2]))
        ends = self._padded(bounds[1, :, None, self._past :, None] - self._past)
        return ~(later & (place < ends.view(-1, 1, self._blocks, 1, self._block, 1)))

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
        delta = self._rows((gradient.to(self._number) * out.to(self._number)).sum(-1))
        ds = (g.to(self._number) @ self._v.to(self._number).mT).sub_(delta.unsqueeze(-1)).mul_(p).mul_(self._scale).to(g.dtype)
        dq += self._back(ds @ self._k)
        size = self._shape[2]
        dk[:, :, self._past :] += (ds.mT @ self._q).flatten(2, 3)[:, :, :size]
        dv[:, :, self._past :] += (p.to(g.dtype).mT @ g).flatten(2, 3)[:, :, :size]
