"""Every backend of this machine against fp64.

test_triton.py runs this file again, for the Triton kernels in the interpreter.
"""

from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlm_dist.kernels import (
    attention,
    available_backends,
    block_causal_attention,
    decode_attention,
)
from bitlm_dist.kernels.attention_inputs import (
    bounds_of_documents,
    truncate_bounds,
    validate_inputs,
)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

# Error relative to the largest element, above rounding. The interpreter multiplies bf16 wrongly, so
# bf16 is for GPUs only.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3} | ({torch.bfloat16: 2e-2} if ON_GPU else {})
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}

# FlexAttention has no backward on a CPU
TRAINING = [name for name in available_backends() if ON_GPU or name != "flex"]

# the reference computes in the dtype of its inputs, so half precision would not meet the tolerance
PAIRS = [
    (name, dtype)
    for name in TRAINING
    for dtype in DTYPES
    if name != "reference" or dtype == "float32"
]
worst: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def _report():
    yield
    print(
        "\nlargest relative errors:",
        {name: f"{error:.1e}" for name, error in sorted(worst.items())},
    )


def truth(q, k, v, block, document_ids=None):
    """Compute attention token by token, by its definition."""
    group = q.shape[1] // k.shape[1]
    past = k.shape[2] - q.shape[2]
    out = torch.empty_like(q)

    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            at = past + i
            seen = [j for j in range(k.shape[2]) if j // block <= at // block]
            if document_ids is not None:
                seen = [j for j in seen if document_ids[b, j] == document_ids[b, at]]

            for h in range(q.shape[1]):
                scores = k[b, h // group, seen] @ q[b, h, i] / q.shape[-1] ** 0.5
                out[b, h, i] = scores.softmax(0) @ v[b, h // group, seen]

    return out


def tensors(
    queries, keys, heads=4, kv_heads=2, width=16, dtype=torch.float32, batch=2, device=DEVICE
):
    shapes = [
        (batch, heads, queries, width),
        (batch, kv_heads, keys, width),
        (batch, kv_heads, keys, width),
    ]
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def documents(batch, keys, length):
    """Draw documents of about ``length`` tokens, not aligned to blocks."""
    return (torch.rand(batch, keys) < 1 / length).cumsum(1).to(DEVICE)


def assert_close(name, x, exact):
    """Compare relative to the largest element of the truth, absolutely if the truth is all zero."""
    assert x.isfinite().all(), name
    largest = exact.abs().max().item()
    error = (x.double() - exact).abs().max().item() / (largest if largest > 1e-9 else 1.0)

    key = f"{name} {x.dtype}".replace("torch.", "")
    worst[key] = max(worst.get(key, 0.0), error)
    assert error < TOLERANCE[x.dtype], f"{name}: relative error {error}"


def assert_exact(attend, inputs, block, ids, names=("out", "dq", "dk", "dv")):
    """Compare output and all gradients with the reference backend in fp64."""
    # the reference must see the rounded inputs, so they are drawn in the dtype under test
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = block_causal_attention(*exact, block=block, document_ids=ids, backend="reference")
    out = attend(*inputs, block=block, document_ids=ids)

    weight = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, inputs, weight))
    right = (expected, *torch.autograd.grad(expected, exact, weight.double()))
    for name, x, y in zip(names, found, right, strict=True):
        assert_close(name, x, y)


@pytest.mark.parametrize(
    ("queries", "keys", "block"),
    [(1, 1, 1), (8, 8, 4), (30, 30, 3), (4, 24, 4), (9, 24, 3), (40, 40, 16)],
)
@pytest.mark.parametrize("length", [0, 7])
def test_the_reference_is_the_definition(queries, keys, block, length, seed):
    q, k, v = tensors(queries, keys, dtype=torch.float64)
    ids = documents(2, keys, length) if length else None
    out = block_causal_attention(q, k, v, block=block, document_ids=ids, backend="reference")
    torch.testing.assert_close(out, truth(q, k, v, block, ids))


BLOCKS = [1, 3, 4, 8, 16]
WIDTHS = [16, 64, 128]
LENGTHS = [1, 5, 64, 130, 257]


def grid():
    """Yield all combinations of backend, dtype, block size, width and length.

    All but a subset are marked slow. The subset has every pair of a length and a block size once,
    and so covers every pair of either with a width.
    """
    for (i, length), (j, block), (k, width) in product(*map(enumerate, (LENGTHS, BLOCKS, WIDTHS))):
        for backend, dtype in PAIRS:
            quick = k == (i + j) % len(WIDTHS)
            yield pytest.param(
                backend, dtype, block, width, length, marks=[] if quick else pytest.mark.slow
            )


@pytest.mark.parametrize(("backend", "dtype", "block", "width", "length"), grid())
def test_forward_and_gradients(length, width, block, backend, dtype, seed):
    """Grouped heads; one row is one document, the other has several."""
    inputs = tensors(length, length, 2, 1, width, DTYPES[dtype])
    ids = documents(2, length, 1 + length / 4)
    ids[0] = 0
    if attention.unsupported_reason(backend, validate_inputs(*inputs, block, ids)):
        pytest.skip("not supported")
    assert_exact(partial(block_causal_attention, backend=backend), inputs, block, ids)


# queries, keys, block size, length of the documents (0: one document)
PARTS = [
    (64, 192, 16, 40),
    (64, 256, 8, 0),
    (130, 259, 3, 0),
    (130, 642, 16, 200),
    (257, 257, 300, 60),
    (4, 260, 4, 0),
    (130, 130, 4, 0),
]


@pytest.mark.parametrize("backend", TRAINING)
@pytest.mark.parametrize(("queries", "keys", "block", "length"), PARTS)
def test_the_last_queries_against_all_keys(backend, queries, keys, block, length, seed):
    dtype = "bfloat16" if ON_GPU else "float32"
    inputs = tensors(queries, keys, 4, 2, 64, DTYPES[dtype])
    ids = documents(2, keys, length) if length else None
    if attention.unsupported_reason(backend, validate_inputs(*inputs, block, ids)):
        pytest.skip("not supported")
    assert_exact(partial(block_causal_attention, backend=backend), inputs, block, ids)


@pytest.mark.parametrize("backend", TRAINING)
def test_strides_and_a_scale(backend, seed):
    """Queries, keys and values packed as one projection returns them, [S, B, H, 3D]."""
    dtype = torch.float16 if ON_GPU else torch.float32
    packed = torch.randn(70, 2, 4, 3 * 16, device=DEVICE, dtype=dtype, requires_grad=True)
    ids = documents(2, 70, 20)
    exact = packed.detach().double().requires_grad_()

    def run(x, **choice):
        q, k, v = (part.permute(1, 2, 0, 3) for part in x.split(16, -1))
        return block_causal_attention(q, k, v, block=4, scale=0.7, **choice).permute(2, 0, 1, 3)

    out = run(packed, document_bounds=bounds_of_documents(ids), backend=backend)
    expected = run(exact, document_ids=ids, backend="reference")
    assert_close("out", out, expected)
    if backend == "triton":
        assert out.is_contiguous()  # so the layer's reshape copies nothing

    # the gradient of a sum is expanded: its strides are 0
    gradient = torch.autograd.grad(out.sum(), packed)[0]
    assert_close("d(packed)", gradient, torch.autograd.grad(expected.sum(), exact)[0])


def test_the_cpu_path_takes_any_strides(seed):
    """The flash operator of torch for CPUs returns wrong results if the last dimension is not
    contiguous.
    """
    q, k, v = (torch.randn(2, 2, 40, 3 * 16, requires_grad=True) for _ in "qkv")
    run = partial(block_causal_attention, q[..., ::3], k[..., 1::3], v[..., 2::3], block=4)
    torch.testing.assert_close(run(backend="merge"), run(backend="reference"))

    grads = [
        torch.autograd.grad(run(backend=name).sum(), (q, k, v)) for name in ("merge", "reference")
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", TRAINING)
def test_an_empty_batch(backend):
    q, k, v = tensors(4, 4, batch=0)
    out = block_causal_attention(q, k, v, block=2, backend=backend)
    assert out.shape == q.shape
    assert torch.autograd.grad(out.sum(), k)[0].shape == k.shape


@pytest.mark.integration
@pytest.mark.skipif(ON_GPU, reason="tests the operator for CPUs")
def test_memory_grows_with_the_length_not_its_square(seed):
    """Twice as many additional tokens must allocate twice as much, forward and backward."""

    def allocated(length):
        inputs = tensors(length, length, 2, 2, 32, batch=1)
        with torch.profiler.profile(profile_memory=True) as profile:
            block_causal_attention(*inputs, block=4, backend="merge").sum().backward()
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())

    one, two, four = (allocated(length) for length in (1024, 2048, 4096))
    growth = (four - two) / (two - one)  # would be 4 if memory grew with the square
    assert growth == pytest.approx(2, rel=0.1), (one, two, four)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_bounds_of_documents(data):
    rows = data.draw(
        st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=1, max_size=3)
    )
    starts, ends = bounds_of_documents(torch.tensor(rows))
    cut = data.draw(st.integers(1, 9))
    cut_starts, cut_ends = truncate_bounds(torch.stack((starts, ends)), cut)

    for row, first, last, first_cut, last_cut in zip(
        rows, *(x.tolist() for x in (starts, ends, cut_starts, cut_ends)), strict=True
    ):
        for place, token in enumerate(row):
            begin = place
            end = place + 1
            while begin and row[begin - 1] == token:
                begin -= 1
            while end < 9 and row[end] == token:
                end += 1

            # a document is the maximal run of equal ids around a position
            assert (first[place], last[place]) == (begin, end)
            if place < cut:
                assert (first_cut[place], last_cut[place]) == (begin, min(end, cut))


@pytest.mark.parametrize(("new", "block"), [(4, 4), (3, 4), (8, 4), (5, 1), (1, 1)])
def test_decoding_reads_each_rows_own_length(new, block, seed):
    # rows of different lengths, none of which fills the cache
    with torch.no_grad():
        lengths = torch.tensor([block * n + new for n in (5, 0, 9)], device=DEVICE)
        longest = int(lengths.max()) + 7
        q, k, v = (x.detach() for x in tensors(new, longest, batch=3))
        out = decode_attention(q, k, v, block=block, lengths=lengths)

        for b, length in enumerate(lengths.tolist()):
            row = [q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length]]
            expected = block_causal_attention(*row, block=block, backend="reference")
            torch.testing.assert_close(out[b : b + 1], expected)
            torch.testing.assert_close(decode_attention(*row, block=block), expected)

    with pytest.raises(ValueError, match=r"lengths \(2,\) .* expected \[B\] = \(3,\)"):
        decode_attention(q, k, v, block=block, lengths=lengths[:2])


def test_wrong_arguments_are_named():
    attend = block_causal_attention
    q, k, v = tensors(8, 8)
    with pytest.raises(
        ValueError, match=r"backend 'fa9' does not exist: choose from auto, .*, reference$"
    ):
        attend(q, k, v, block=2, backend="fa9")
    with pytest.raises(ValueError, match="block = 0"):
        attend(q, k, v, block=0)

    # shapes, dtypes and devices
    with pytest.raises(ValueError, match="multiple of block = 4"):
        attend(q[:, :, :3], k, v, block=4)
    with pytest.raises(ValueError, match="H a multiple of G"):
        attend(q[:, :3], k, v, block=4)
    with pytest.raises(ValueError, match=r"expected q \[B,H,S,D\]"):
        attend(q[0], k, v, block=4)
    with pytest.raises(ValueError, match=r"v is torch.float16 on \w+(:0)?, q is torch.float32"):
        attend(q, k, v.half(), block=2)
    with pytest.raises(ValueError, match="k is torch.float32 on meta, q is torch.float32"):
        attend(q, k.to("meta"), v, block=2)
    with pytest.raises(ValueError, match="torch.int64: attention needs floating-point"):
        attend(*(x.long() for x in (q, k, v)), block=2)
    with pytest.raises(ValueError, match="scale = -1: must be positive"):
        attend(q, k, v, block=2, scale=-1)

    ids = torch.zeros(2, 8, dtype=torch.int64, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"document_ids \(2, 7\) .* expected integers \[B, T\] = \(2, 8\)"
    ):
        attend(q, k, v, block=4, document_ids=ids[:, :7])
    with pytest.raises(ValueError, match="document_ids .* torch.float32"):
        attend(q, k, v, block=4, document_ids=ids.float())
    with pytest.raises(ValueError, match=r"document_bounds \(2, 8\) .* expected int32 \[2, B, T\]"):
        attend(q, k, v, block=2, document_bounds=ids.int())
    with pytest.raises(ValueError, match="both given"):
        attend(q, k, v, block=2, document_ids=ids, document_bounds=bounds_of_documents(ids))
    with pytest.raises(ValueError, match="documents are on meta, k on"):
        attend(q, k, v, block=2, document_bounds=bounds_of_documents(ids).to("meta"))


def test_a_back_end_that_does_not_fit_says_which_does():
    q, k, v = tensors(8, 8, width=8)
    for name in set(attention.BACKENDS) - set(available_backends()):
        with pytest.raises(
            ValueError,
            match=rf"backend '{name}' is not available here: .*; choose from .*, reference$",
        ):
            block_causal_attention(q, k, v, block=2, backend=name)

    if not ON_GPU:
        with pytest.raises(
            ValueError, match="backend 'flex': .* backward .*; .*merge, reference would take it"
        ):
            block_causal_attention(q, k, v, block=2, backend="flex")


def test_the_choice_is_said_once(caplog):
    attention._log_backend_once.cache_clear()
    q, k, v = tensors(8, 8, width=24)
    with caplog.at_level("INFO", logger="bitlm_dist.kernels"):
        for _ in range(3):
            block_causal_attention(q, k, v, block=2)

    assert len(caplog.messages) == 1
    assert "float32, head dim 24: backend" in caplog.messages[0]


def test_the_compiler_takes_availability_for_a_constant():
    """The mark is torch's own, which may be renamed."""
    marked = torch.compiler.assume_constant_result(lambda name: None)
    assert vars(marked).items() <= vars(attention.unavailable_reason).items()


def test_doctor_knows_every_back_end():
    from bitlm_dist.cli.doctor import ATTENTION_BACKENDS, iter_findings

    assert tuple(ATTENTION_BACKENDS) == attention.BACKENDS
    found = {
        finding.name
        for finding in dict(iter_findings())["attention, first choice first"]
        if finding.is_available
    }
    assert found == set(available_backends())
