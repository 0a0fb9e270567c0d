"""Triton kernels of block-causal attention: forward, gradient of the queries, gradient of keys and
values.

The keys that a query attends to are one contiguous range, [low, high): from the start of its
document to the end of its block or document. The queries that attend to a key are one range too:
from the start of its block or document to the end of its document. Both ends are non-decreasing
from one position to the next. So the first and last row of a tile determine which tiles of the
other side it needs, and which of them without a mask. The inner loops load nothing but the
operands.

Legend: B batch, H query heads, G key-value heads, S queries, T keys, D head dimension; ``past`` =
T - S. Positions count from the first key. ``starts`` and ``ends`` [B, T]: first position of every
token's document, and the one after its last.
"""

# Triton reads annotations as types of kernel arguments, so only constexprs have one.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E), and exp2 is one instruction
LN2 = tl.constexpr(0.6931471805599453)

# Initial maximum of a row. Finite, as a masked score minus it would otherwise be -inf - -inf = NaN.
LOWEST = tl.constexpr(-3.0e38)

# Arguments that vary from call to call: specializing on their values would recompile the kernels
# over and over.
SIZES = ["scale", "block", "queries", "keys", "heads", "group"]


@triton.jit
def _visible_keys(at, block, keys, starts, ends, documents: tl.constexpr):
    """Range of keys, [low, high), that the query at position ``at`` attends to."""
    low = at * 0
    high = tl.minimum((at // block + 1) * block, keys)
    if documents:
        low = tl.load(starts + at)
        high = tl.minimum(high, tl.load(ends + at))
    return low, high


@triton.jit
def _visible_to_queries(at, block, keys, past, starts, ends, documents: tl.constexpr):
    """Range of queries, as positions, that attend to the key at position ``at``."""
    low = at // block * block
    high = at * 0 + keys
    if documents:
        low = tl.maximum(low, tl.load(starts + at))
        high = tl.load(ends + at)
    return tl.maximum(low, past), high


@triton.jit
def _split_full_and_masked_tiles(first, first_high, last_low, last, tile: tl.constexpr):
    """Split the range first..last-1 of the other side into full tiles and masked ones at its ends.

    Returns:
        full_start: position of the first full tile.
        num_full: number of full tiles.
        num_masked_left: number of masked tiles before them, from ``first`` on.
        num_masked: number of masked tiles on both sides.
        gap: positions that full tiles cover, to skip after the masked tiles on the left.
    """
    num_masked_left = tl.cdiv(tl.maximum(last_low - first, 0), tile)
    full_start = first + num_masked_left * tile
    num_full = tl.maximum(first_high - full_start, 0) // tile

    gap = num_full * tile
    num_masked = num_masked_left + tl.cdiv(tl.maximum(last - full_start - gap, 0), tile)
    return full_start, num_full, num_masked_left, num_masked, gap


@triton.jit
def _row_pointers(pointer, first, stride, tile: tl.constexpr, width: tl.constexpr):
    """Addresses of ``tile`` rows from row ``first`` on."""
    # int64, as row times stride may exceed 2^31
    row = tl.arange(0, tile)
    column = tl.arange(0, width)
    return pointer + first.to(tl.int64) * stride + (row[:, None] * stride + column[None, :])


@triton.jit
def _accumulate_forward(
    q, acc, total, top, k, v, stride_k, stride_v,
    begin, num_tiles, left, gap, last, low, high, scale2,
    tile: tl.constexpr, width: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Add tiles of keys to the online softmax.

    Returns:
        acc: unnormalized output [queries, D].
        total: sum of the weights [queries].
        top: maximum score [queries], scaled for exp2.
    """
    lane = tl.arange(0, tile)
    for number in range(0, num_tiles):
        start = begin + number * tile
        if masked:
            start += tl.where(number >= left, gap, 0)

        at = start + lane
        k_rows = _row_pointers(k, start, stride_k, tile, width)
        v_rows = _row_pointers(v, start, stride_v, tile, width)
        k_tile = (
            tl.load(k_rows, mask=(at < last)[:, None], other=0.0) if masked else tl.load(k_rows)
        )
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        if masked:
            visible = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
            scores = tl.where(visible, scores, float("-inf"))

        # rescale what was summed under the previous maximum
        new_top = tl.maximum(top, tl.max(scores, 1) * scale2)
        weights = tl.exp2(scores * scale2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]

        v_tile = (
            tl.load(v_rows, mask=(at < last)[:, None], other=0.0) if masked else tl.load(v_rows)
        )
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        top = new_top

    return acc, total, top


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, out, lse, starts, ends,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os,
    scale, block, queries, keys, heads, group,
    width: tl.constexpr, tile_queries: tl.constexpr, tile_keys: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Compute out [B, H, S, D] and the natural log-sum-exp lse [B, H, S].

    Each program computes one tile of queries of one head.
    """
    num_tiles = tl.cdiv(queries, tile_queries)
    program = tl.program_id(0)
    # Rows with the most keys come first, so that no multiprocessor finishes late.
    tile = num_tiles - 1 - program % num_tiles
    b = (program // num_tiles // heads).to(tl.int64)
    h = (program // num_tiles % heads).to(tl.int64)
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
    # Rows past the end are clamped to the last one, and never stored.
    low, high = _visible_keys(
        tl.minimum(past + row, keys - 1), block, keys, starts, ends, documents
    )
    first, first_high = _visible_keys(past + begin, block, keys, starts, ends, documents)
    last_low, last = _visible_keys(
        tl.minimum(past + begin + tile_queries, keys) - 1, block, keys, starts, ends, documents
    )
    full_start, num_full, num_masked_left, num_masked, gap = _split_full_and_masked_tiles(
        first, first_high, last_low, last, tile_keys
    )

    q_tile = tl.load(
        _row_pointers(q, begin, stride_qs, tile_queries, width), mask=inside, other=0.0
    )
    acc = tl.zeros([tile_queries, width], tl.float32)
    total = tl.zeros([tile_queries], tl.float32)
    top = tl.zeros([tile_queries], tl.float32) + LOWEST
    scale2 = scale * LOG2E

    # full tiles first, compiled without a mask; then the masked tiles on both sides
    acc, total, top = _accumulate_forward(
        q_tile, acc, total, top, k, v, stride_ks, stride_vs,
        full_start, num_full, 0, 0, last, low, high, scale2,
        tile_keys, width, False,
    )  # fmt: skip
    acc, total, top = _accumulate_forward(
        q_tile, acc, total, top, k, v, stride_ks, stride_vs,
        first, num_masked, num_masked_left, gap, last, low, high, scale2,
        tile_keys, width, True,
    )  # fmt: skip

    acc = acc / total[:, None]
    tl.store(
        _row_pointers(out, begin, stride_os, tile_queries, width),
        acc.to(out.dtype.element_ty),
        mask=inside,
    )
    row_offset = (b * heads + h) * queries + row
    tl.store(lse + row_offset, top * LN2 + tl.log(total), mask=row < queries)


@triton.jit
def _accumulate_dq(
    dq, q, dout, lse2, delta, k, v, stride_k, stride_v,
    begin, num_tiles, left, gap, last, low, high, scale2,
    tile: tl.constexpr, width: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Add the contribution of tiles of keys to dq [queries, D], without the factor ``scale``."""
    lane = tl.arange(0, tile)
    for number in range(0, num_tiles):
        start = begin + number * tile
        if masked:
            start += tl.where(number >= left, gap, 0)

        at = start + lane
        k_rows = _row_pointers(k, start, stride_k, tile, width)
        v_rows = _row_pointers(v, start, stride_v, tile, width)
        if masked:
            k_tile = tl.load(k_rows, mask=(at < last)[:, None], other=0.0)
            v_tile = tl.load(v_rows, mask=(at < last)[:, None], other=0.0)
        else:
            k_tile = tl.load(k_rows)
            v_tile = tl.load(v_rows)

        # probabilities are recomputed from the log-sum-exp
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        weights = tl.exp2(scores * scale2 - lse2[:, None])
        if masked:
            visible = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
            weights = tl.where(visible, weights, 0.0)

        # softmax backward: dS = P * (dP - delta)
        dweights = tl.dot(dout, tl.trans(v_tile), input_precision="ieee")
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision="ieee")

    return dq


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q, k, v, out, dout, lse, dlse, delta, dq, starts, ends,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_ob, stride_oh, stride_os,
    stride_gb, stride_gh, stride_gs, stride_db, stride_dh, stride_ds,
    scale, block, queries, keys, heads, group,
    width: tl.constexpr, tile_queries: tl.constexpr, tile_keys: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Compute dq [B, H, S, D], and delta [B, H, S] = sum(out * dout) - dlse for :func:`dkv_kernel`.

    Each program computes one tile of queries of one head.
    """
    num_tiles = tl.cdiv(queries, tile_queries)
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles
    b = (program // num_tiles // heads).to(tl.int64)
    h = (program // num_tiles % heads).to(tl.int64)
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
    low, high = _visible_keys(
        tl.minimum(past + row, keys - 1), block, keys, starts, ends, documents
    )
    first, first_high = _visible_keys(past + begin, block, keys, starts, ends, documents)
    last_low, last = _visible_keys(
        tl.minimum(past + begin + tile_queries, keys) - 1, block, keys, starts, ends, documents
    )
    full_start, num_full, num_masked_left, num_masked, gap = _split_full_and_masked_tiles(
        first, first_high, last_low, last, tile_keys
    )

    # dlse enters like -delta: the gradient of the log-sum-exp is the probabilities
    row_offset = (b * heads + h) * queries + row
    dout_tile = tl.load(
        _row_pointers(dout, begin, stride_gs, tile_queries, width), mask=inside, other=0.0
    )
    out_tile = tl.load(
        _row_pointers(out, begin, stride_os, tile_queries, width), mask=inside, other=0.0
    )
    slope = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        slope -= tl.load(dlse + row_offset, mask=row < queries, other=0.0)
    tl.store(delta + row_offset, slope, mask=row < queries)

    q_tile = tl.load(
        _row_pointers(q, begin, stride_qs, tile_queries, width), mask=inside, other=0.0
    )
    lse2 = tl.load(lse + row_offset, mask=row < queries, other=0.0) * LOG2E
    acc = tl.zeros([tile_queries, width], tl.float32)
    scale2 = scale * LOG2E
    acc = _accumulate_dq(
        acc, q_tile, dout_tile, lse2, slope, k, v, stride_ks, stride_vs,
        full_start, num_full, 0, 0, last, low, high, scale2, tile_keys, width, False,
    )  # fmt: skip
    acc = _accumulate_dq(
        acc, q_tile, dout_tile, lse2, slope, k, v, stride_ks, stride_vs,
        first, num_masked, num_masked_left, gap, last, low, high, scale2, tile_keys, width, True,
    )  # fmt: skip
    tl.store(
        _row_pointers(dq, begin, stride_ds, tile_queries, width),
        (acc * scale).to(dq.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _accumulate_dkv(
    dk, dv, k, v, q, dout, lse, delta, stride_q, stride_qh, stride_g, stride_gh, queries, group,
    begin, num_tiles, left, gap, last, past, low, high, scale2,
    tile: tl.constexpr, width: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Add the contribution of tiles of queries, of all ``group`` heads, to dk and dv [keys, D].

    dk lacks the factor ``scale``.
    """
    lane = tl.arange(0, tile)
    # One loop, not two nested ones, so that loads stay pipelined from head to head.
    for step in range(0, num_tiles * group):
        number = step // group
        member = (step - number * group).to(tl.int64)
        start = begin + number * tile
        if masked:
            start += tl.where(number >= left, gap, 0)

        at = start + lane
        q_rows = _row_pointers(q + member * stride_qh, start - past, stride_q, tile, width)
        dout_rows = _row_pointers(dout + member * stride_gh, start - past, stride_g, tile, width)
        row_offset = member * queries + start - past
        if masked:
            q_tile = tl.load(q_rows, mask=(at < last)[:, None], other=0.0)
            lse2 = tl.load(lse + row_offset + lane, mask=at < last, other=0.0) * LOG2E
        else:
            q_tile = tl.load(q_rows)
            lse2 = tl.load(lse + row_offset + lane) * LOG2E

        # probabilities are recomputed from the log-sum-exp
        scores = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        weights = tl.exp2(scores * scale2 - lse2[None, :])
        if masked:
            seeing = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
            weights = tl.where(seeing, weights, 0.0)
            dout_tile = tl.load(dout_rows, mask=(at < last)[:, None], other=0.0)
            slope = tl.load(delta + row_offset + lane, mask=at < last, other=0.0)
        else:
            dout_tile = tl.load(dout_rows)
            slope = tl.load(delta + row_offset + lane)

        # softmax backward: dS = P * (dP - delta)
        dv = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
        dweights = tl.dot(v, tl.trans(dout_tile), input_precision="ieee")
        dscores = weights * (dweights - slope[None, :])
        dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision="ieee")

    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv, starts, ends,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs, stride_gb, stride_gh, stride_gs,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    scale, block, queries, keys, heads, group,
    width: tl.constexpr, tile_queries: tl.constexpr, tile_keys: tl.constexpr,
    documents: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv [B, G, T, D].

    Each program computes one tile of keys of one key-value head, summed over its query heads: no
    atomics.
    """
    num_tiles = tl.cdiv(keys, tile_keys)
    program = tl.program_id(0)
    tile = program % num_tiles  # the first keys have the most queries
    kv_heads = heads // group
    b = (program // num_tiles // kv_heads).to(tl.int64)
    g = (program // num_tiles % kv_heads).to(tl.int64)
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
    low, high = _visible_to_queries(
        tl.minimum(row, keys - 1), block, keys, past, starts, ends, documents
    )
    first, first_high = _visible_to_queries(begin, block, keys, past, starts, ends, documents)
    last_low, last = _visible_to_queries(
        tl.minimum(begin + tile_keys, keys) - 1, block, keys, past, starts, ends, documents
    )
    last = tl.maximum(last, first)  # no queries, if the document ends before the first one
    full_start, num_full, num_masked_left, num_masked, gap = _split_full_and_masked_tiles(
        first, first_high, last_low, last, tile_queries
    )

    k_tile = tl.load(_row_pointers(k, begin, stride_ks, tile_keys, width), mask=inside, other=0.0)
    v_tile = tl.load(_row_pointers(v, begin, stride_vs, tile_keys, width), mask=inside, other=0.0)
    dk_acc = tl.zeros([tile_keys, width], tl.float32)
    dv_acc = tl.zeros([tile_keys, width], tl.float32)
    scale2 = scale * LOG2E

    # the query heads of this group are consecutive
    q += b * stride_qb + g * group * stride_qh
    dout += b * stride_gb + g * group * stride_gh
    lse += (b * heads + g * group) * queries
    delta += (b * heads + g * group) * queries
    dk_acc, dv_acc = _accumulate_dkv(
        dk_acc, dv_acc, k_tile, v_tile, q, dout, lse, delta,
        stride_qs, stride_qh, stride_gs, stride_gh, queries, group,
        full_start, num_full, 0, 0, last, past, low, high, scale2,
        tile_queries, width, False,
    )  # fmt: skip
    dk_acc, dv_acc = _accumulate_dkv(
        dk_acc, dv_acc, k_tile, v_tile, q, dout, lse, delta,
        stride_qs, stride_qh, stride_gs, stride_gh, queries, group,
        first, num_masked, num_masked_left, gap, last, past, low, high, scale2,
        tile_queries, width, True,
    )  # fmt: skip
    tl.store(
        _row_pointers(dk, begin, stride_dks, tile_keys, width),
        (dk_acc * scale).to(dk.dtype.element_ty),
        mask=inside,
    )
    tl.store(
        _row_pointers(dv, begin, stride_dvs, tile_keys, width),
        dv_acc.to(dv.dtype.element_ty),
        mask=inside,
    )
