"""The arguments of one call of block-causal attention, checked once, as every back end takes them.

What a query sees is one run of keys, [low, high): from the start of its document to the end of its block or document.

Legend: B batch, H query heads, G key-value heads, S queries, T keys, D width of a head. S <= T: queries are the last S positions.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """Checked arguments of :func:`~bitlm_dist.kernels.block_causal_attention`."""

    q: Tensor  # [B, H, S, D]
    k: Tensor  # [B, G, T, D]
    v: Tensor  # [B, G, T, D]
    block: int
    bounds: Tensor | None  # int32 [2, B, T], see bounds_of_documents; None: one document a row
    scale: float

    @property
    def past(self) -> int:
        """Keys before the first query."""
        return self.k.shape[2] - self.q.shape[2]

    @property
    def differentiated(self) -> bool:
        """Whether a backward pass may follow."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))

    def of(self, q: Tensor, k: Tensor, v: Tensor) -> "Call":
        """The same for other tensors of the same shapes."""
        return replace(self, q=q, k=k, v=v)


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    document_ids: Tensor | None = None,
    document_bounds: Tensor | None = None,
    scale: float | None = None,
) -> Call:
    """The call, or a ValueError that names the argument, its value and what fits. Reads no numbers of the tensors."""
    shapes = f"q {(*q.shape,)}, k {(*k.shape,)}, v {(*v.shape,)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"{shapes}: expected q [B,H,S,D] and k, v [B,G,T,D]")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: batch and head width must be equal, and H a multiple of G")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: all three must agree")
    if not q.is_floating_point():
        raise ValueError(f"q, k and v are {q.dtype}: attention needs floating-point numbers")
    if block < 1:
        raise ValueError(f"block = {block}: a block holds at least one token")
    if k.shape[2] < q.shape[2] or (k.shape[2] - q.shape[2]) % block:
        raise ValueError(f"{k.shape[2]} keys before {q.shape[2]} queries: T - S must be a multiple of block = {block}")
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale = {scale}: must be positive")
    return Call(q, k, v, block, _checked_bounds(k, document_ids, document_bounds), scale)


def _checked_bounds(k: Tensor, ids: Tensor | None, bounds: Tensor | None) -> Tensor | None:
    if ids is not None:
        if bounds is not None:
            raise ValueError("document_ids and document_bounds are both given: they say the same, give one")
        rows = (k.shape[0], k.shape[2])
        if ids.shape != rows or ids.is_floating_point():
            raise ValueError(f"document_ids {(*ids.shape,)} {ids.dtype}: expected integers [B, T] = {rows}")
        bounds = bounds_of_documents(ids)
    if bounds is None:
        return None
    expected = (2, k.shape[0], k.shape[2])
    if bounds.shape != expected or bounds.dtype != torch.int32:
        raise ValueError(f"document_bounds {(*bounds.shape,)} {bounds.dtype}: expected int32 [2, B, T] = {expected}")
    if bounds.device != k.device:
        raise ValueError(f"documents are on {bounds.device}, k on {k.device}: all tensors must be on one device")
    return bounds


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Where to launch kernels: on the current device, which need not be x's. Without any (fake tensors) they are only compiled."""
    return torch.cuda.device(x.device) if x.is_cuda and torch.cuda.is_available() else nullcontext()


def bounds_of_documents(document_ids: Tensor) -> Tensor:
    """Document ids [B, T] -> int32 [2, B, T]: first position of each token's document, and the one after its last.

    A document is a run of equal ids: the same id after another one is another document.
    """
    batch, keys = document_ids.shape
    place = torch.arange(keys, device=document_ids.device, dtype=torch.int32).expand(batch, -1)
    edge = torch.ones(batch, 1, dtype=torch.bool, device=document_ids.device)
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    starts = place.where(torch.cat((edge, changes), 1)[:, :keys], 0).cummax(1).values
    ends = (place + 1).where(torch.cat((changes, edge), 1)[:, :keys], keys).flip(1).cummin(1).values.flip(1)
    return torch.stack((starts, ends)).int()


def first_keys(bounds: Tensor, keys: int) -> Tensor:
    """The bounds of the first ``keys`` positions, as if nothing followed."""
    return bounds[..., :keys].clamp(max=keys)


def seen_by_queries(call: Call) -> tuple[Tensor, Tensor]:
    """Run of keys that each query sees, [low, high): int32 [B or 1, S] both. Neither ever falls from one query to the next."""
    keys = call.k.shape[2]
    at = torch.arange(call.past, keys, device=call.q.device, dtype=torch.int32)[None]
    high = ((at // call.block + 1) * call.block).clamp(max=keys)
    if call.bounds is None:
        return torch.zeros_like(high), high
    starts, ends = call.bounds[:, :, call.past :]
    return starts, torch.minimum(high, ends)
