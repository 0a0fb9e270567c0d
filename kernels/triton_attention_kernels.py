"""Triton kernels of block-causal attention: forward, gradient of the queries, gradient of keys and values.

What a query sees is one run of keys, [low, high): from the start of its document to the end of its block or document. What sees a
key is one run of queries: from the start of its block or document to the end of its document. Neither end ever falls from one
position to the next, so the first and last row of a tile say which tiles of the other side it needs at all, and which of them every
row needs in full. The former are visited, the latter without a mask; the loops read nothing but the operands.

Legend: B batch, H query heads, G key-value heads, S queries, T keys, D width of a head; ``past`` = T - S. Positions count from the
first key. ``starts`` and ``ends`` [B, T]: first position of every token's document, and the one after its last.
"""

# Triton reads annotations as the types of a kernel's arguments.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E), and exp2 is one instruction
LN2 = tl.constexpr(0.6931471805599453)
# Finite: a row that has seen nothing yet subtracts it from -inf, and -inf - -inf would be NaN.
LOWEST = tl.constexpr(-3.0e38)

# Sizes that differ from call to call: a kernel for each of their divisors would be compiled again and again.
SIZES = ["scale", "block", "queries", "keys", "heads", "group"]


@triton.jit
def _seen_by_query(at, block, keys, starts, ends, documents: tl.constexpr):
    """Run of keys that the query at position ``at`` sees."""
    low = at * 0
    high = tl.minimum((at // block + 1) * block, keys)
    if documents:
        low = tl.load(starts + at)
        high = tl.minimum(high, tl.load(ends + at))
    return low, high


@triton.jit
def _seeing_key(at, block, keys, past, starts, ends, documents: tl.constexpr):
    """Run of queries, as positions, that see the key at position ``at``."""
    low = at // block * block
    high = at * 0 + keys
    if documents:
        low = tl.maximum(low, tl.load(starts + at))
        high = tl.load(ends + at)
    return tl.maximum(low, past), high


@triton.jit
def _plan(first, first_high, last_low, last, tile: tl.constexpr):
    """Tiles of the run first..last-1 of which rows of the other side need a part: masked ones at both ends, whole ones between.

    Returns:
        whole: where the whole tiles begin.
        wholes: how many there are.
        left: masked tiles from ``first`` on.
        masked: masked tiles in all; those after the left ones begin ``gap`` later than if they followed at once.
        gap: see above.
    """
    left = tl.cdiv(tl.maximum(last_low - first, 0), tile)
    whole = first + left * tile
    wholes = tl.maximum(first_high - whole, 0) // tile
    gap = wholes * tile
    masked = left + tl.cdiv(tl.maximum(last - whole - gap, 0), tile)
    return whole, wholes, left, masked, gap


@triton.jit
def _rows(pointer, first, stride, tile: tl.constexpr, width: tl.constexpr):
    """Addresses of ``tile`` rows from row ``first`` on; row times stride may pass 2^31."""
    row = tl.arange(0, tile)
    column = tl.arange(0, width)
    return pointer + first.to(tl.int64) * stride + (row[:, None] * stride + column[None, :])


@triton.jit
def _attend(
    q, acc, total, top, k, v, stride_k, stride_v, begin, count, left, gap, last, low, high, scale2,
    tile: tl.constexpr, width: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Add these tiles of keys to the running softmax: acc [queries, D] unnormalized, total weight, top score in powers of 2."""
    lane = tl.arange(0, tile)
    for number in range(0, count):
        start = begin + number * tile
        if masked:
            start += tl.where(number >= left, gap, 0)
        at = start + lane
        k_rows = _rows(k, start, stride_k, tile, width)
        v_rows = _rows(v, start, stride_v, tile, width)
        k_tile = tl.load(k_rows, mask=(at < last)[:, None], other=0.0) if masked else tl.load(k_rows)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        if masked:
            visible = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale2)
        weights = tl.exp2(scores * scale2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v_tile = tl.load(v_rows, mask=(at < last)[:, None], other=0.0) if masked else tl.load(v_rows)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, lse, starts, ends,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    scale, block, queries, keys, heads, group,
    width: tl.constexpr, tile_queries: tl.constexpr, tile_keys: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: out [B, H, S, D] and the natural log-sum-exp lse [B, H, S]."""
    tiles = tl.cdiv(queries, tile_queries)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles  # the longest rows first, so that no multiprocessor ends late
    b = (program // tiles // heads).to(tl.int64)
    h = (program // tiles % heads).to(tl.int64)
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + h // group * stride_kh
    v += b * stride_vb + h // group * stride_vh
    out += b * stride_ob + h * stride_oh
    if documents:
        starts += b * keys
        ends += b * keys

    past = keys - queries
    begin = tile * tile_queries
    row = begin + tl.arange(0, tile_queries)
    inside = (row < queries)[:, None]
    # Rows past the end see what the last one sees: nothing of them is stored.
    low, high = _seen_by_query(tl.minimum(past + row, keys - 1), block, keys, starts, ends, documents)
    first, first_high = _seen_by_query(past + begin, block, keys, starts, ends, documents)
    last_low, last = _seen_by_query(tl.minimum(past + begin + tile_queries, keys) - 1, block, keys, starts, ends, documents)
    whole, wholes, left, masked, gap = _plan(first, first_high, last_low, last, tile_keys)

    q_tile = tl.load(_rows(q, begin, stride_qs, tile_queries, width), mask=inside, other=0.0)
    acc = tl.zeros([tile_queries, width], tl.float32)
    total = tl.zeros([tile_queries], tl.float32)
    top = tl.zeros([tile_queries], tl.float32) + LOWEST
    scale2 = scale * LOG2E
    acc, total, top = _attend(
        q_tile, acc, total, top, k, v, stride_ks, stride_vs, whole, wholes, 0, 0, last, low, high, scale2,
        tile_keys, width, False,
    )  # fmt: skip
    acc, total, top = _attend(
        q_tile, acc, total, top, k, v, stride_ks, stride_vs, first, masked, left, gap, last, low, high, scale2,
        tile_keys, width, True,
    )  # fmt: skip
    acc = acc / total[:, None]
    tl.store(_rows(out, begin, stride_os, tile_queries, width), acc.to(out.dtype.element_ty), mask=inside)
    place = (b * heads + h) * queries + row
    tl.store(lse + place, top * LN2 + tl.log(total), mask=row < queries)


@triton.jit
def _descend(
    dq, q, dout, lse2, delta, k, v, stride_k, stride_v, begin, count, left, gap, last, low, high, scale2,
    tile: tl.constexpr, width: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Add what these tiles of keys contribute to dq [queries, D], the factor ``scale`` left out."""
    lane = tl.arange(0, tile)
    for number in range(0, count):
        start = begin + number * tile
        if masked:
            start += tl.where(number >= left, gap, 0)
        at = start + lane
        k_rows = _rows(k, start, stride_k, tile, width)
        v_rows = _rows(v, start, stride_v, tile, width)
        if masked:
            k_tile = tl.load(k_rows, mask=(at < last)[:, None], other=0.0)
            v_tile = tl.load(v_rows, mask=(at < last)[:, None], other=0.0)
        else:
            k_tile = tl.load(k_rows)
            v_tile = tl.load(v_rows)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        weights = tl.exp2(scores * scale2 - lse2[:, None])
        if masked:
            visible = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
            weights = tl.where(visible, weights, 0.0)
        dweights = tl.dot(dout, tl.trans(v_tile), input_precision="ieee")
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q, k, v, out, dout, lse, dlse, delta, dq, starts, ends,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_gs, stride_db, stride_dh, stride_ds,
    scale, block, queries, keys, heads, group,
    width: tl.constexpr, tile_queries: tl.constexpr, tile_keys: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: dq [B, H, S, D], and delta [B, H, S] = sum(out * dout) - dlse for :func:`dkv_kernel`."""
    tiles = tl.cdiv(queries, tile_queries)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    b = (program // tiles // heads).to(tl.int64)
    h = (program // tiles % heads).to(tl.int64)
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + h // group * stride_kh
    v += b * stride_vb + h // group * stride_vh
    out += b * stride_ob + h * stride_oh
    dout += b * stride_gb + h * stride_gh
    dq += b * stride_db + h * stride_dh
    if documents:
        starts += b * keys
        ends += b * keys

    past = keys - queries
    begin = tile * tile_queries
    row = begin + tl.arange(0, tile_queries)
    inside = (row < queries)[:, None]
    low, high = _seen_by_query(tl.minimum(past + row, keys - 1), block, keys, starts, ends, documents)
    first, first_high = _seen_by_query(past + begin, block, keys, starts, ends, documents)
    last_low, last = _seen_by_query(tl.minimum(past + begin + tile_queries, keys) - 1, block, keys, starts, ends, documents)
    whole, wholes, left, masked, gap = _plan(first, first_high, last_low, last, tile_keys)

    place = (b * heads + h) * queries + row
    dout_tile = tl.load(_rows(dout, begin, stride_gs, tile_queries, width), mask=inside, other=0.0)
    out_tile = tl.load(_rows(out, begin, stride_os, tile_queries, width), mask=inside, other=0.0)
    slope = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        slope -= tl.load(dlse + place, mask=row < queries, other=0.0)
    tl.store(delta + place, slope, mask=row < queries)

    q_tile = tl.load(_rows(q, begin, stride_qs, tile_queries, width), mask=inside, other=0.0)
    lse2 = tl.load(lse + place, mask=row < queries, other=0.0) * LOG2E
    acc = tl.zeros([tile_queries, width], tl.float32)
    scale2 = scale * LOG2E
    acc = _descend(
        acc, q_tile, dout_tile, lse2, slope, k, v, stride_ks, stride_vs, whole, wholes, 0, 0, last, low, high, scale2,
        tile_keys, width, False,
    )  # fmt: skip
    acc = _descend(
        acc, q_tile, dout_tile, lse2, slope, k, v, stride_ks, stride_vs, first, masked, left, gap, last, low, high, scale2,
        tile_keys, width, True,
    )  # fmt: skip
    tl.store(_rows(dq, begin, stride_ds, tile_queries, width), (acc * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _collect(
    dk, dv, k, v, q, dout, lse, delta, stride_q, stride_qh, stride_g, stride_gh, queries, group,
    begin, count, left, gap, last, past, low, high, scale2,
    tile: tl.constexpr, width: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Add what these tiles of queries, of all ``group`` heads, contribute to dk, dv [keys, D]; in dk without ``scale``."""
    lane = tl.arange(0, tile)
    for step in range(0, count * group):  # one loop, not two: the pipeline of loads runs on from head to head
        number = step // group
        member = (step - number * group).to(tl.int64)
        start = begin + number * tile
        if masked:
            start += tl.where(number >= left, gap, 0)
        at = start + lane
        q_rows = _rows(q + member * stride_qh, start - past, stride_q, tile, width)
        dout_rows = _rows(dout + member * stride_gh, start - past, stride_g, tile, width)
        place = member * queries + start - past
        if masked:
            q_tile = tl.load(q_rows, mask=(at < last)[:, None], other=0.0)
            lse2 = tl.load(lse + place + lane, mask=at < last, other=0.0) * LOG2E
        else:
            q_tile = tl.load(q_rows)
            lse2 = tl.load(lse + place + lane) * LOG2E
        scores = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        weights = tl.exp2(scores * scale2 - lse2[None, :])
        if masked:
            seeing = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
            weights = tl.where(seeing, weights, 0.0)
            dout_tile = tl.load(dout_rows, mask=(at < last)[:, None], other=0.0)
            slope = tl.load(delta + place + lane, mask=at < last, other=0.0)
        else:
            dout_tile = tl.load(dout_rows)
            slope = tl.load(delta + place + lane)
        dv = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(dout_tile), input_precision="ieee")
        dscores = weights * (dweights - slope[None, :])
        dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, starts, ends,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gs, stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    scale, block, queries, keys, heads, group,
    width: tl.constexpr, tile_queries: tl.constexpr, tile_keys: tl.constexpr, documents: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key-value head: dk, dv [B, G, T, D] summed over its query heads here, so without atomics."""
    tiles = tl.cdiv(keys, tile_keys)
    program = tl.program_id(0)
    tile = program % tiles  # the first keys are seen by the most queries
    kv_heads = heads // group
    b = (program // tiles // kv_heads).to(tl.int64)
    g = (program // tiles % kv_heads).to(tl.int64)
    k += b * stride_kb + g * stride_kh
    v += b * stride_vb + g * stride_vh
    dk += b * stride_dkb + g * stride_dkh
    dv += b * stride_dvb + g * stride_dvh
    if documents:
        starts += b * keys
        ends += b * keys

    past = keys - queries
    begin = tile * tile_keys
    row = begin + tl.arange(0, tile_keys)
    inside = (row < keys)[:, None]
    low, high = _seeing_key(tl.minimum(row, keys - 1), block, keys, past, starts, ends, documents)
    first, first_high = _seeing_key(begin, block, keys, past, starts, ends, documents)
    last_low, last = _seeing_key(tl.minimum(begin + tile_keys, keys) - 1, block, keys, past, starts, ends, documents)
    last = tl.maximum(last, first)  # a document that ends before the first query
    whole, wholes, left, masked, gap = _plan(first, first_high, last_low, last, tile_queries)

    k_tile = tl.load(_rows(k, begin, stride_ks, tile_keys, width), mask=inside, other=0.0)
    v_tile = tl.load(_rows(v, begin, stride_vs, tile_keys, width), mask=inside, other=0.0)
    dk_acc = tl.zeros([tile_keys, width], tl.float32)
    dv_acc = tl.zeros([tile_keys, width], tl.float32)
    scale2 = scale * LOG2E
    q += b * stride_qb + g * group * stride_qh
    dout += b * stride_gb + g * group * stride_gh
    lse += (b * heads + g * group) * queries
    delta += (b * heads + g * group) * queries
    dk_acc, dv_acc = _collect(
        dk_acc, dv_acc, k_tile, v_tile, q, dout, lse, delta, stride_qs, stride_qh, stride_gs, stride_gh, queries, group,
        whole, wholes, 0, 0, last, past, low, high, scale2, tile_queries, width, False,
    )  # fmt: skip
    dk_acc, dv_acc = _collect(
        dk_acc, dv_acc, k_tile, v_tile, q, dout, lse, delta, stride_qs, stride_qh, stride_gs, stride_gh, queries, group,
        first, masked, left, gap, last, past, low, high, scale2, tile_queries, width, True,
    )  # fmt: skip
    tl.store(_rows(dk, begin, stride_dks, tile_keys, width), (dk_acc * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(_rows(dv, begin, stride_dvs, tile_keys, width), dv_acc.to(dv.dtype.element_ty), mask=inside)
