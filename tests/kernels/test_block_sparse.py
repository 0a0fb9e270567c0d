import gc
import shutil
import sys
import types
import weakref
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

from bitlm_dist.kernels import block_sparse, fa4, flex
from bitlm_dist.kernels.attention_inputs import validate_inputs


def call_of(
    queries,
    keys,
    block,
    ids=None,
    *,
    heads=4,
    kv_heads=2,
    width=16,
    batch=2,
    dtype=torch.float32,
    device="cpu",
    grad=False,
):
    shapes = [(batch, heads, queries, width), *[(batch, kv_heads, keys, width)] * 2]
    ids = None if ids is None else ids.to(device)
    return validate_inputs(
        *(torch.randn(x, dtype=dtype, device=device, requires_grad=grad) for x in shapes),
        block,
        document_ids=ids,
    )


def documents(keys, batch=2, length=40):
    return (torch.rand(batch, keys) < 1 / length).cumsum(1)


def dense_mask(call):
    """Mask [B or 1, S, T] by the definition."""
    past = call.num_past_keys
    keys = call.k.shape[2]
    key = torch.arange(keys)
    mask = (key // call.block)[None] <= (key[past:] // call.block)[:, None]
    if call.document_bounds is None:
        return mask[None]

    first = call.document_bounds[0]  # identifies the document
    return mask & (first[:, past:, None] == first[:, None])


def truth(call):
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return ((q @ k.mT * call.scale).masked_fill(~dense_mask(call)[:, None], -torch.inf)).softmax(
        -1
    ) @ v


def lists_of(tiles):
    """Indices of the true elements of each row of a mask [B, N, M]."""
    return [[row.nonzero()[:, 0].tolist() for row in rows] for rows in tiles]


def entries(count, index):
    assert count.dtype == index.dtype == torch.int32
    return [
        [row[:n].tolist() for n, row in zip(ns, rows, strict=True)]
        for ns, rows in zip(count[:, 0].tolist(), index[:, 0], strict=True)
    ]


@st.composite
def masks(draw):
    block = draw(st.integers(1, 20))
    queries = draw(st.integers(1, 90))
    keys = queries + block * draw(st.integers(0, 60 // block))

    ids = None
    if draw(st.booleans()):
        starts = draw(
            st.lists(st.lists(st.booleans(), min_size=keys, max_size=keys), min_size=2, max_size=2)
        )
        ids = torch.tensor(starts).cumsum(1)

    return call_of(queries, keys, block, ids, heads=1, kv_heads=1, width=1)


@settings(max_examples=150, deadline=None)
@given(masks(), st.integers(1, 40), st.integers(1, 40))
def test_lists_are_those_of_the_dense_mask(call, tile_queries, tile_keys):
    dense = dense_mask(call)
    padding = (0, -dense.shape[2] % tile_keys, 0, -dense.shape[1] % tile_queries)
    padded = torch.nn.functional.pad(dense, padding)
    tiles = padded.unflatten(2, (-1, tile_keys)).unflatten(1, (-1, tile_queries)).transpose(2, 3)
    full = tiles.flatten(3).all(3)
    partial = tiles.flatten(3).any(3) & ~full

    lists = block_sparse.tile_lists(call, tile_queries, tile_keys)
    assert entries(lists.num_partial, lists.partial_index) == lists_of(partial)
    assert entries(lists.num_full, lists.full_index) == lists_of(full)

    columns = block_sparse.transposed_tile_lists(call, tile_queries, tile_keys)
    assert entries(columns.num_partial, columns.partial_index) == lists_of(partial.mT)
    assert entries(columns.num_full, columns.full_index) == lists_of(full.mT)

    # padding entries must be valid tiles too
    for index, width in [(lists.partial_index, full.shape[2]), (columns.full_index, full.shape[1])]:
        assert index.shape[-1] == width
        assert ((index >= 0) & (index < width)).all()


@pytest.mark.parametrize("several", [False, True])
def test_block_mask_is_the_one_that_torch_finds(several, seed):
    call = call_of(300, 450, 3, documents(450) if several else None)
    dense = dense_mask(call)
    found = create_block_mask(
        lambda b, h, i, j: dense[b, i, j], dense.shape[0], 1, 300, 450, device="cpu"
    ).as_tuple()

    made = flex.block_mask(call).as_tuple()
    assert made[:2] == found[:2]
    for place in range(2, 10, 2):
        assert entries(*made[place : place + 2]) == entries(*found[place : place + 2])


def test_lists_wait_for_nothing():
    # reading an element of a meta tensor fails, as would any synchronization
    ids = torch.zeros(2, 900, dtype=torch.long)
    for call in (call_of(500, 900, 4, x, device="meta") for x in (None, ids)):
        assert block_sparse.tile_lists(call, 128, 64).full_index.shape[2:] == (4, 15)
        assert block_sparse.transposed_tile_lists(call, 128, 64).full_index.shape[2:] == (15, 4)


def test_layers_share_lists_and_new_documents_get_new_ones(seed):
    call = call_of(200, 200, 4, documents(200))
    lists = block_sparse.tile_lists(call, 64, 64)
    assert block_sparse.tile_lists(call.with_qkv(call.q + 1, call.k, call.v), 64, 64) is lists
    assert block_sparse.tile_lists(call, 64, 32) is not lists

    # a new batch is copied into the same buffer
    call.document_bounds.copy_(
        validate_inputs(call.q, call.k, call.v, 4, documents(200)).document_bounds
    )
    assert block_sparse.tile_lists(call, 64, 64) is not lists

    whole = call_of(200, 200, 4)
    assert block_sparse.tile_lists(whole, 64, 64) is block_sparse.tile_lists(
        call_of(200, 200, 4), 64, 64
    )
    assert block_sparse.tile_lists(call_of(200, 200, 8), 64, 64) is not block_sparse.tile_lists(
        whole, 64, 64
    )


def test_lists_go_with_their_documents(seed):
    call = call_of(200, 200, 4, documents(200))
    made = [
        flex.block_mask(call),
        fa4._mask_tensors(call),
        block_sparse.transposed_tile_lists(call, 64, 64),
    ]
    bounds = weakref.ref(call.document_bounds)
    lists = weakref.ref(made[0].kv_indices)

    del call, made
    gc.collect()

    assert bounds() is None
    assert lists() is None


def test_lists_of_an_evaluation_serve_training():
    with torch.inference_mode():
        lists = block_sparse.tile_lists(call_of(111, 111, 3), 64, 64)
    assert not any(x.is_inference() for x in lists)

    # fake tensors must not be cached
    with FakeTensorMode():
        block_sparse.tile_lists(call_of(112, 112, 4), 64, 64)
    assert block_sparse.tile_lists(call_of(112, 112, 4), 64, 64).num_full.tolist() == [[[0, 0]]]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
@pytest.mark.parametrize(
    ("queries", "keys", "block", "several"), [(300, 300, 4, False), (257, 407, 3, True)]
)
@torch.no_grad()
def test_flex_forward_equals_the_definition(queries, keys, block, several, seed):
    call = call_of(queries, keys, block, documents(keys) if several else None, grad=True)
    torch.testing.assert_close(flex.attention(call).double(), truth(call), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
@torch.no_grad()
def test_blocks_and_documents_are_no_constants_of_a_flex_kernel(seed):
    from torch._dynamo.utils import counters

    for queries, keys, several, blocks in [
        (300, 300, False, (4, 1, 7, 300)),
        (257, 407, True, (3, 1, 50)),
    ]:
        flex.attention(call_of(queries, keys, blocks[0], documents(keys) if several else None))
        compiled = counters["stats"]["unique_graphs"]

        for block in blocks[1:]:
            call = call_of(
                queries, keys, block, documents(keys, length=10 * block) if several else None
            )
            torch.testing.assert_close(
                flex.attention(call).double(), truth(call), rtol=1e-5, atol=1e-5
            )

        assert counters["stats"]["unique_graphs"] == compiled


def test_flex_names_what_it_does_not_take():
    assert flex.unsupported_reason(call_of(8, 8, 4)) is None
    assert (
        flex.unsupported_reason(call_of(8, 8, 4, grad=True))
        == "FlexAttention has no backward on a CPU"
    )
    with torch.no_grad():
        assert flex.unsupported_reason(call_of(8, 8, 4, grad=True)) is None
    assert "float64" in flex.unsupported_reason(call_of(8, 8, 4, dtype=torch.float64))
    assert "meta" in flex.unsupported_reason(call_of(8, 8, 4, device="meta"))


def test_fa4_names_what_it_does_not_take():
    half = {"dtype": torch.bfloat16, "device": "meta"}
    for block in (1, 3, 16, 500):
        assert (
            fa4.unsupported_reason(call_of(8, 1008 // block * block + 8, block, width=64, **half))
            is None
        )
    assert "float32" in fa4.unsupported_reason(call_of(8, 8, 4, device="meta"))
    assert "head dim 20" in fa4.unsupported_reason(call_of(8, 8, 4, width=20, **half))
    assert "head dim 136" in fa4.unsupported_reason(call_of(8, 8, 4, width=136, **half))
    assert "cpu" in fa4.unsupported_reason(call_of(8, 8, 4, dtype=torch.float16))

    # only its backward pass is non-deterministic
    torch.use_deterministic_algorithms(True)
    try:
        assert fa4.unsupported_reason(call_of(8, 8, 4, **half)) is None
        assert "deterministic" in fa4.unsupported_reason(call_of(8, 8, 4, grad=True, **half))
    finally:
        torch.use_deterministic_algorithms(False)


class Sparse(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


def visible(sparse, seen, queries, keys, batch, columns):
    """Mask [B, S, T] that kernels apply by following the lists: the given mask in partial tiles,
    everything in full tiles, and nothing elsewhere.
    """
    tile_queries, tile_keys = sparse.block_size
    rows = -(-queries // tile_queries) * tile_queries
    low, high = (
        x.expand(batch, -1)[:, :rows, None]
        for x in ([torch.zeros_like(seen[0]), *seen] if len(seen) == 1 else seen)
    )
    key = torch.arange(-(-keys // tile_keys) * tile_keys)
    mask = (key >= low) & (key < high)

    out = torch.zeros_like(mask)
    for count, index, full in [(*sparse[:2], False), (*sparse[2:4], True)]:
        for b in range(batch):
            for n, tiles in enumerate(
                entries(count.expand(batch, -1, -1), index.expand(batch, -1, -1, -1))[b]
            ):
                for other in tiles:
                    i, j = (other, n) if columns else (n, other)
                    here = (
                        b,
                        slice(i * tile_queries, (i + 1) * tile_queries),
                        slice(j * tile_keys, (j + 1) * tile_keys),
                    )
                    out[here] = True if full else mask[here]

    return out[:, :queries, :keys]


def dense_scores(q, k, scale, mask):
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return (torch.einsum("bshd,bthd->bhst", q.double(), k.double()) * scale).masked_fill(
        ~mask[:, None], -torch.inf
    )


def dense_forward(
    q, k, v, *, softmax_scale, pack_gqa, mask_mod, aux_tensors, block_sparse_tensors, out, lse
):
    mask = visible(
        block_sparse_tensors, aux_tensors, q.shape[1], k.shape[1], q.shape[0], columns=False
    )

    scores = dense_scores(q, k, softmax_scale, mask)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2).double()
    out.copy_(torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v))
    lse.copy_(scores.logsumexp(-1))


def dense_backward(
    q,
    k,
    v,
    out,
    dout,
    lse,
    *,
    softmax_scale,
    mask_mod,
    aux_tensors,
    block_sparse_tensors,
    dq,
    dk,
    dv,
):
    mask = visible(
        block_sparse_tensors, aux_tensors, q.shape[1], k.shape[1], q.shape[0], columns=True
    )

    group = q.shape[2] // k.shape[2]
    p = (dense_scores(q, k, softmax_scale, mask) - lse[..., None]).exp()
    v = v.repeat_interleave(group, 2).double()
    dout = dout.double()

    dv.copy_(torch.einsum("bhst,bshd->bthd", p, dout).unflatten(2, (-1, group)).sum(3))
    delta = (out.double() * dout).sum(-1).transpose(1, 2)[..., None]
    ds = p * (torch.einsum("bshd,bthd->bhst", dout, v) - delta) * softmax_scale
    dq.copy_(torch.einsum("bhst,bthd->bshd", ds, k.repeat_interleave(group, 2).double()))
    dk.copy_(torch.einsum("bhst,bshd->bthd", ds, q.double()).unflatten(2, (-1, group)).sum(3))


def package(monkeypatch):
    """Replace the functions of flash-attn-4 by dense ones that follow the given tile lists.

    Tensors are [B, positions, heads, D].
    """
    interface = types.SimpleNamespace(_flash_attn_fwd=dense_forward, _flash_attn_bwd=dense_backward)
    sparsity = types.SimpleNamespace(BlockSparseTensorsTorch=Sparse)

    # the modules that fa4.py imports
    for name, module in [
        ("", None),
        (".cute", None),
        (".cute.interface", interface),
        (".cute.block_sparsity", sparsity),
    ]:
        monkeypatch.setitem(
            sys.modules, "flash_attn" + name, module or types.ModuleType("flash_attn" + name)
        )

    # a mask in CuTe needs the package, and the device a GPU
    monkeypatch.setattr(fa4, "_mask_mod", lambda documents: documents)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize(
    ("queries", "keys", "block", "several"),
    [(400, 400, 4, False), (257, 407, 3, True), (5, 260, 5, False), (384, 384, 500, True)],
)
def test_fa4_gives_both_passes_the_right_lists(queries, keys, block, several, seed, monkeypatch):
    package(monkeypatch)
    call = call_of(queries, keys, block, documents(keys) if several else None, grad=True)
    inputs = (call.q, call.k, call.v)

    out = fa4.attention(call)
    expected = truth(call)
    weight = torch.randn_like(out)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(out, inputs, weight)
    for x, y in zip(gradients, torch.autograd.grad(expected, inputs, weight.double()), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

    torch.library.opcheck(
        torch.ops.bitlm.flash_attention_4, (*inputs, call.document_bounds, call.block, call.scale)
    )


def test_fa4_has_shapes_and_gradients_without_a_device():
    call = call_of(40, 60, 4, dtype=torch.bfloat16, device="meta", grad=True)
    out = fa4.attention(call)
    out.sum().backward()
    assert out.shape == call.q.shape
    assert call.k.grad.shape == call.k.shape
