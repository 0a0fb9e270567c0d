"""The Triton kernels on a CPU, by Triton's interpreter: test_triton.py runs this file in a process of its own.

The interpreter needs 5 to 15 ms for every step of a tile, and multiplies bf16 wrongly: few and large tiles, fp32 and fp16.
"""

import pytest
import torch
from bitlm_dist.kernels import attention, in_block, triton_attention, triton_in_block
from torch.library import opcheck

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}
worst: dict[str, float] = {}


@pytest.fixture(autouse=True)
def _seed(request):
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    print(f"seed = {seed}")


@pytest.fixture(scope="session", autouse=True)
def _report():
    yield
    print("\nlargest relative errors:", {name: f"{error:.1e}" for name, error in sorted(worst.items())})


def assert_close(name, x, truth):
    """By the largest number of the truth; by the difference itself where the truth is 0 everywhere."""
    assert x.isfinite().all(), name
    largest = truth.abs().max().item()
    error = (x.double() - truth).abs().max().item() / (largest if largest > 1e-9 else 1.0)
    key = f"{name} {x.dtype}".replace("torch.", "")
    worst[key] = max(worst.get(key, 0.0), error)
    assert error < TOLERANCE[x.dtype], f"{name}: relative error {error}"


def documents(batch, keys, length):
    """Runs of random lengths around ``length``, not aligned to blocks."""
    return (torch.rand(batch, keys) < 1 / length).cumsum(1)


def tensors(queries, keys, heads, kv_heads, width, dtype=torch.float32, batch=2):
    shapes = [(batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, width)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def truth(q, k, v, block, ids, scale=None):
    """Out, lse and the scores' mask by the reference back end in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = attention.block_causal_attention(q, k, v, block=block, document_ids=ids, scale=scale, backend="reference")
    mask = attention._visible(k.shape[2] - q.shape[2], k.shape[2], k.shape[2], block, ids, q)
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (q, k, v), out, scores.masked_fill(~mask, -torch.inf).logsumexp(-1)


# queries, keys, block, width, query heads, key-value heads, documents' length (0: none), dtype
CASES = [
    (1, 1, 1, 16, 2, 1, 0, torch.float32),
    (1, 1, 4, 64, 1, 1, 3, torch.float32),
    (5, 5, 3, 16, 4, 2, 2, torch.float32),
    (5, 13, 4, 64, 2, 1, 4, torch.float32),
    (64, 64, 4, 32, 2, 2, 0, torch.float16),
    (64, 192, 16, 64, 4, 2, 40, torch.float32),
    (64, 256, 8, 128, 2, 1, 0, torch.float16),
    (130, 130, 3, 128, 2, 1, 20, torch.float32),
    (130, 130, 16, 16, 2, 2, 100, torch.float16),
    (130, 259, 3, 64, 2, 1, 0, torch.float32),
    (257, 257, 1, 64, 1, 1, 0, torch.float32),
    (257, 257, 8, 64, 2, 1, 30, torch.float32),
    (257, 257, 4, 128, 2, 1, 150, torch.float32),
    (257, 257, 300, 16, 1, 1, 60, torch.float32),
    (130, 642, 16, 16, 2, 1, 200, torch.float32),
]


@pytest.mark.parametrize(("queries", "keys", "block", "width", "heads", "kv_heads", "length", "dtype"), CASES)
def test_attention_equals_the_reference(queries, keys, block, width, heads, kv_heads, length, dtype):
    q, k, v = tensors(queries, keys, heads, kv_heads, width, dtype)
    ids = documents(2, keys, length) if length else None
    out, lse = triton_attention.attention_with_lse(q, k, v, block=block, document_ids=ids)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), (q, k, v))
    inputs, expected, expected_lse = truth(q, k, v, block, ids)
    assert_close("out", out, expected)
    assert (lse - expected_lse).abs().max() < (1e-5 if dtype == torch.float32 else 1e-3)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for name, gradient, right in zip(("dq", "dk", "dv"), gradients, expected_gradients, strict=True):
        assert_close(name, gradient, right)


def test_attention_takes_strides_a_scale_and_the_gradient_of_lse():
    packed = torch.randn(70, 2, 4, 3 * 16, requires_grad=True)  # [S, B, H, 3D] as of one projection
    q, k, v = (x.permute(1, 2, 0, 3) for x in packed.split(16, -1))
    ids = documents(2, 70, 20)
    bounds = triton_attention.bounds_of_documents(ids)
    out, lse = triton_attention.attention_with_lse(q, k, v, block=4, document_bounds=bounds, scale=0.7)
    assert out.permute(2, 0, 1, 3).is_contiguous()  # so the layer's reshape copies nothing
    inputs, expected, expected_lse = truth(q, k, v, 4, ids, 0.7)
    weight = torch.randn(lse.shape)
    gradient = torch.autograd.grad(out.sum() + (lse * weight).sum(), packed)[0]  # sum: a gradient without strides
    parts = torch.autograd.grad(expected.sum() + (expected_lse * weight).sum(), inputs)
    assert_close("out", out, expected)
    assert_close("d(packed)", gradient, torch.cat([x.permute(2, 0, 1, 3) for x in parts], -1))
    only_lse = torch.autograd.grad(triton_attention.attention_with_lse(q, k, v, block=4)[1].sum(), packed)[0]
    assert only_lse[..., 32:].eq(0).all()
    assert only_lse[..., :32].any()


def test_attention_visits_no_tile_that_it_need_not():
    ids = (torch.arange(512) >= 256).long()[None]
    q, k, v = tensors(512, 512, 1, 1, 64, batch=1)
    with torch.no_grad():
        k[:, :, 128:256] = torch.nan  # the future of the first tile of queries, and another document than that of the last two
    out = triton_attention.block_causal_attention(q, k, v, block=4, document_ids=ids)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    for name, x in (("out", out), ("dq", dq)):
        assert x[:, :, :128].isfinite().all(), name
        assert x[:, :, 128:256].isnan().all(), name
        assert x[:, :, 256:].isfinite().all(), name
    assert dk[:, :, 256:].isfinite().all()  # the queries that see NaN are not theirs
    assert dv[:, :, 256:].isfinite().all()


def test_bounds_of_documents():
    bounds = triton_attention.bounds_of_documents(torch.tensor([[7, 7, 7, 1, 7], [0, 0, 0, 0, 0]]))
    assert bounds.tolist() == [[[0, 0, 0, 3, 4], [0] * 5], [[3, 3, 3, 4, 5], [5] * 5]]


def test_attention_of_an_empty_batch():
    q, k, v = tensors(4, 4, 2, 1, 16, batch=0)
    out = triton_attention.block_causal_attention(q, k, v, block=2)
    assert out.shape == q.shape
    assert torch.autograd.grad(out.sum(), k)[0].shape == k.shape


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("blocks", "block", "width", "dtype"),
    [
        (1, 1, 16, torch.float32),
        (130, 3, 64, torch.float32),
        (5, 4, 16, torch.float32),
        (33, 4, 128, torch.float16),
        (17, 8, 24, torch.float32),
        (9, 16, 64, torch.float16),
        (3, 64, 128, torch.float32),
    ],
)
def test_in_block_attention_equals_the_reference(blocks, block, width, dtype, causal):
    qkv = torch.randn(2, blocks, block, 3, 2, width, dtype=dtype, requires_grad=True)
    out = triton_in_block.in_block_attention(qkv, block, causal)
    weight = torch.randn_like(out)
    gradient = torch.autograd.grad((out * weight).sum(), qkv)[0]
    qkv = qkv.detach().double().requires_grad_()
    expected = in_block.in_block_attention(qkv, block, causal)
    assert_close("in-block out", out, expected)
    assert_close("in-block dqkv", gradient, torch.autograd.grad((expected * weight).sum(), qkv)[0])


def test_in_block_attention_takes_strides():
    wide = torch.randn(6, 4, 3, 2, 40, requires_grad=True)
    for qkv in (wide[..., :32], wide[::2, :, :, :, 8:], wide.transpose(0, 1)[:, :4], wide.mT[..., :2, :].mT[:0]):
        block = qkv.shape[1]
        out = triton_in_block.in_block_attention(qkv, block)
        torch.testing.assert_close(out, in_block.in_block_attention(qkv, block))
        gradient = torch.autograd.grad(out.sum(), wide)[0]
        expected = torch.autograd.grad(in_block.in_block_attention(qkv, block).sum(), wide)[0]
        torch.testing.assert_close(gradient, expected)


def test_operators_obey_torch():
    q, k, v = tensors(6, 8, 2, 1, 16, batch=1)
    bounds = triton_attention.bounds_of_documents(documents(1, 8, 3))
    opcheck(torch.ops.bitlm.block_causal_attention.default, (q, k, v, bounds, 2, 0.25))
    opcheck(torch.ops.bitlm.in_block_attention.default, (torch.randn(3, 4, 3, 2, 16, requires_grad=True), True))


def test_compile_does_not_break_the_graph():
    def model(q, k, v, ids, qkv):
        attended = triton_attention.block_causal_attention(q * 2, k, v, block=2, document_ids=ids)
        return attended.square().sum() + triton_in_block.in_block_attention(qkv * 2, 4).square().sum()

    inputs = [*tensors(8, 8, 2, 1, 16), documents(2, 8, 3), torch.randn(3, 4, 3, 2, 16, requires_grad=True)]
    differentiated = [x for x in inputs if x.requires_grad]
    expected = torch.autograd.grad(model(*inputs), differentiated)
    got = torch.autograd.grad(torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs), differentiated)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_arguments_are_named():
    attend = triton_attention.block_causal_attention
    q, k, v = tensors(8, 8, 4, 2, 16)
    with pytest.raises(ValueError, match=r"head width 8: .* \(16, 32, 64, 128\); backend='sdpa'"):
        attend(q[..., :8], k[..., :8], v[..., :8], block=2)
    with pytest.raises(ValueError, match=r"q is torch.float64: .* backend='reference'"):
        attend(q.double(), k.double(), v.double(), block=2)
    with pytest.raises(ValueError, match=r"v is torch.float16 on cpu, q is torch.float32"):
        attend(q, k, v.half(), block=2)
    with pytest.raises(ValueError, match=r"k has strides .* contiguous; backend='sdpa'"):
        attend(q, k.mT.contiguous().mT, v, block=2)
    with pytest.raises(ValueError, match="H a multiple of G"):
        attend(q[:, :3], k, v, block=2)
    with pytest.raises(ValueError, match="multiple of block = 4"):
        attend(q[:, :, :3], k, v, block=4)
    with pytest.raises(ValueError, match="block = 0"):
        attend(q, k, v, block=0)
    with pytest.raises(ValueError, match="scale = -1"):
        attend(q, k, v, block=2, scale=-1)
    with pytest.raises(ValueError, match=r"document_ids .* expected \[B, T\]"):
        attend(q, k, v, block=2, document_ids=torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"document_bounds .* expected contiguous int32"):
        attend(q, k, v, block=2, document_bounds=torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 4, 3, heads, head_width\]"):
        triton_in_block.in_block_attention(torch.zeros(3, 2, 3, 2, 16), 4)
    with pytest.raises(ValueError, match="head width 160"):
        triton_in_block.in_block_attention(torch.zeros(3, 2, 3, 2, 160), 2)
    with pytest.raises(ValueError, match="block = 65"):
        triton_in_block.in_block_attention(torch.zeros(1, 65, 3, 2, 16), 65)
