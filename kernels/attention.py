"""Block-causal attention: token i attends to token j iff floor(j/m) <= floor(i/m).

Legend: B batch, H query heads, G key-value heads, S queries, T keys, D width of a head.

Back ends, all exact:

``reference``
    softmax over an explicit [S, T] mask, any dtype; the truth that tests compare with.
``sdpa``
    torch's fused attention over tiles of queries. A tile sees only the keys up to its last block, so no S x T mask exists and
    the work stays near the exact mask's. m = 1 without documents and decoding of one block need no mask at all.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 256  # queries of a tile; rounded up to whole blocks


def available_backends() -> tuple[str, ...]:
    """Names that ``backend=`` accepts on this machine, best first."""
    return ("sdpa", "reference")


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    document_ids: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention with full sight inside a block and causal sight across blocks (paper, section 3.2).

    Args:
        q: [B, H, S, D]. With T > S keys the queries are the last S positions (decoding with a key-value cache).
        k: [B, G, T, D], H a multiple of G (grouped-query attention).
        v: [B, G, T, D].
        block: m, tokens a block. T - S must be a multiple of it; the last block may be incomplete.
        document_ids: [B, T] integers; a token sees only its own document. None: one document.
        scale: factor on the scores, 1/sqrt(D) by default.
        backend: ``auto`` or one of :func:`available_backends`.

    Returns:
        [B, H, S, D] in the dtype of q.

    Raises:
        ValueError: a shape, the block size or the back end does not fit; the message names it.
    """
    _check(q, k, v, block, document_ids)
    if backend == "auto":
        backend = available_backends()[0]
    if backend not in available_backends():
        raise ValueError(f"attention backend {backend!r} is not available here: choose from {available_backends()}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if backend == "reference":
        return _reference(q, k, v, block, document_ids, scale)
    return _sdpa(q, k, v, block, document_ids, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, block: int, document_ids: Tensor | None) -> None:
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4:
        raise ValueError(f"expected q [B,H,S,D] and k, v [B,G,T,D], got {(*q.shape,)}, {(*k.shape,)}, {(*v.shape,)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {(*q.shape,)} and k {(*k.shape,)} differ in batch or head width, or H is no multiple of G")
    if block < 1:
        raise ValueError(f"block = {block}: a block holds at least one token")
    if k.shape[2] < q.shape[2] or (k.shape[2] - q.shape[2]) % block:
        raise ValueError(f"{k.shape[2]} keys before {q.shape[2]} queries: T - S must be a multiple of block = {block}")
    if document_ids is not None and document_ids.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"document_ids {(*document_ids.shape,)}: expected [B, T] = {(k.shape[0], k.shape[2])}")


def _visible(first: int, last: int, keys: int, block: int, document_ids: Tensor | None, like: Tensor) -> Tensor:
    """Mask of the queries at positions first..last-1 over ``keys`` keys: [B or 1, 1, last - first, keys]."""
    query = torch.arange(first, last, device=like.device)
    key = torch.arange(keys, device=like.device)
    mask = (key < (query // block * block + block)[:, None])[None, None]
    if document_ids is not None:
        mask = mask & (document_ids[:, None, first:last, None] == document_ids[:, None, None, :keys])
    return mask


def _reference(q: Tensor, k: Tensor, v: Tensor, block: int, document_ids: Tensor | None, scale: float) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    past = k.shape[2] - q.shape[2]
    mask = _visible(past, k.shape[2], k.shape[2], block, document_ids, q)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, block: int, document_ids: Tensor | None, scale: float) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    past = keys - queries
    grouped = q.shape[1] != k.shape[1]
    if document_ids is None and queries <= block:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    if document_ids is None and block == 1 and past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    tile = -(-TILE // block) * block
    out = []
    for first in range(past, keys, tile):
        last = min(first + tile, keys)
        mask = _visible(first, last, last, block, document_ids, q)
        out.append(
            F.scaled_dot_product_attention(
                q[:, :, first - past : last - past],
                k[:, :, :last],
                v[:, :, :last],
                attn_mask=mask,
                scale=scale,
                enable_gqa=grouped,
            )
        )
    return torch.cat(out, 2) if len(out) > 1 else out[0]
