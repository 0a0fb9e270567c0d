"""Arguments of one call of block-causal attention, validated once for all backends.

The keys that a query attends to are one contiguous range, [low, high): from the start of its
document to the end of its block or document, whichever is first.

Legend: B batch, H query heads, G key-value heads, S queries, T keys, D head dimension. S <= T: the
queries are the last S positions.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Validated arguments of :func:`~bitlm_dist.kernels.block_causal_attention`."""

    q: Tensor  # [B, H, S, D]
    k: Tensor  # [B, G, T, D]
    v: Tensor  # [B, G, T, D]
    block: int

    # int32 [2, B, T], see bounds_of_documents; None: one document per row
    document_bounds: Tensor | None

    scale: float

    @property
    def num_past_keys(self) -> int:
        """Number of keys before the first query."""
        return self.k.shape[2] - self.q.shape[2]

    @property
    def requires_grad(self) -> bool:
        """True if a backward pass may follow."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))

    def with_qkv(self, q: Tensor, k: Tensor, v: Tensor) -> "AttentionInputs":
        """Return a copy with other tensors of the same shapes."""
        return replace(self, q=q, k=k, v=v)


def validate_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    document_ids: Tensor | None = None,
    document_bounds: Tensor | None = None,
    scale: float | None = None,
) -> AttentionInputs:
    """Validate the arguments of :func:`~bitlm_dist.kernels.block_causal_attention`.

    Reads no elements of the tensors, so nothing waits for the device.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what is expected.
    """
    _validate_qkv(q, k, v)

    if block < 1:
        raise ValueError(f"block = {block}: a block holds at least one token")
    if k.shape[2] < q.shape[2] or (k.shape[2] - q.shape[2]) % block:
        raise ValueError(
            f"{k.shape[2]} keys for {q.shape[2]} queries: "
            f"T - S must be a non-negative multiple of block = {block}"
        )

    if scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    elif not 0 < scale < math.inf:
        raise ValueError(f"scale = {scale}: must be positive")

    bounds = _validate_bounds(k, document_ids, document_bounds)
    return AttentionInputs(q, k, v, block, bounds, scale)


def _validate_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {(*q.shape,)}, k {(*k.shape,)}, v {(*v.shape,)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"{shapes}: expected q [B,H,S,D] and k, v [B,G,T,D]")
    if (
        q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or not k.shape[1]
        or q.shape[1] % k.shape[1]
    ):
        raise ValueError(f"{shapes}: batch and head dim must be equal, and H a multiple of G")

    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}: "
                "all three must agree"
            )
    if not q.is_floating_point():
        raise ValueError(f"q, k and v are {q.dtype}: attention needs floating-point tensors")


def _validate_bounds(k: Tensor, ids: Tensor | None, bounds: Tensor | None) -> Tensor | None:
    if ids is not None:
        if bounds is not None:
            raise ValueError("document_ids and document_bounds are both given: pass only one")

        rows = (k.shape[0], k.shape[2])
        if ids.shape != rows or ids.is_floating_point():
            raise ValueError(
                f"document_ids {(*ids.shape,)} {ids.dtype}: expected integers [B, T] = {rows}"
            )
        bounds = bounds_of_documents(ids)

    if bounds is None:
        return None

    expected = (2, k.shape[0], k.shape[2])
    if bounds.shape != expected or bounds.dtype != torch.int32:
        raise ValueError(
            f"document_bounds {(*bounds.shape,)} {bounds.dtype}: "
            f"expected int32 [2, B, T] = {expected}"
        )
    if bounds.device != k.device:
        raise ValueError(
            f"documents are on {bounds.device}, k on {k.device}: all tensors must be on one device"
        )
    return bounds


def device_guard(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of x current while open, as kernels are launched on the current device.

    A no-op without a CUDA device: fake tensors then only compile kernels.
    """
    return torch.cuda.device(x.device) if x.is_cuda and torch.cuda.is_available() else nullcontext()


def bounds_of_documents(document_ids: Tensor) -> Tensor:
    """Compute where each token's document starts and ends.

    A document is a run of equal ids: an id that recurs after another one names a new document.

    Args:
        document_ids: integers [B, T].

    Returns:
        int32 [2, B, T]: the first position of each token's document, and the one after its last.
    """
    batch, keys = document_ids.shape
    positions = torch.arange(keys, device=document_ids.device, dtype=torch.int32).expand(batch, -1)

    # a document starts where the id changes, and at the edge of the row
    edge = torch.ones(batch, 1, dtype=torch.bool, device=document_ids.device)
    changes = document_ids[:, 1:] != document_ids[:, :-1]

    # the latest start so far; and, from the right, the nearest end
    starts = positions.where(torch.cat((edge, changes), 1)[:, :keys], 0).cummax(1).values
    ends = (
        (positions + 1)
        .where(torch.cat((changes, edge), 1)[:, :keys], keys)
        .flip(1)
        .cummin(1)
        .values.flip(1)
    )
    return torch.stack((starts, ends)).int()


def truncate_bounds(bounds: Tensor, num_keys: int) -> Tensor:
    """Cut document bounds to the first ``num_keys`` positions, as if nothing followed them."""
    return bounds[..., :num_keys].clamp(max=num_keys)


def visible_key_ranges(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Range of keys, [low, high), that each query attends to.

    Both ends are non-decreasing from one query to the next, on which the tile lists and the
    kernels rely.

    Returns:
        low, high: int32 [B or 1, S] each.
    """
    keys = inputs.k.shape[2]
    at = torch.arange(inputs.num_past_keys, keys, device=inputs.q.device, dtype=torch.int32)[None]
    high = ((at // inputs.block + 1) * inputs.block).clamp(max=keys)
    if inputs.document_bounds is None:
        return torch.zeros_like(high), high

    starts, ends = inputs.document_bounds[:, :, inputs.num_past_keys :]
    return starts, torch.minimum(high, ends)
