"""The compiled Triton kernels, where there is a GPU: what the interpreter cannot show, bf16 and the tensor cores' pipelines."""

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
# Of the largest number: half a step of the format, and what the products of rounded weights add.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def assert_close(name, x, truth):
    error = ((x.double() - truth).abs().max() / truth.abs().max()).item()
    assert error < TOLERANCE[x.dtype], f"{name}: relative error {error}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("queries", "keys", "block", "length"),
    [(64, 64, 1, 0), (257, 257, 3, 50), (512, 512, 4, 0), (1000, 1000, 8, 300), (130, 642, 16, 0), (256, 1024, 16, 200)],
)
def test_attention_equals_the_reference(queries, keys, block, length, width, dtype, seed):
    from bitlm_dist.kernels import attention, triton_attention

    shapes = [(2, 4, queries, width), (2, 2, keys, width), (2, 2, keys, width)]
    inputs = [torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=True) for shape in shapes]
    ids = (torch.rand(2, keys, device=DEVICE) < 1 / length).cumsum(1) if length else None
    out = triton_attention.block_causal_attention(*inputs, block=block, document_ids=ids)
    weight = torch.randn_like(out)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = attention.block_causal_attention(*exact, block=block, document_ids=ids, backend="reference")
    gradients = torch.autograd.grad(out, inputs, weight)
    expected_gradients = torch.autograd.grad(expected, exact, weight.double())
    for name, x, truth in zip(
        ("out", "dq", "dk", "dv"), (out, *gradients), (expected, *expected_gradients), strict=True
    ):  # fmt: skip
        assert_close(name, x, truth)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("block", "width", "causal"), [(2, 24, False), (3, 64, True), (4, 128, False), (16, 64, False), (64, 32, True)]
)
def test_in_block_attention_equals_the_reference(block, width, causal, dtype, seed):
    from bitlm_dist.kernels import in_block, triton_in_block

    qkv = torch.randn(501, block, 3, 4, width, dtype=dtype, device=DEVICE, requires_grad=True)
    out = triton_in_block.in_block_attention(qkv, block, causal)
    exact = qkv.detach().double().requires_grad_()
    expected = in_block.in_block_attention(exact, block, causal)
    weight = torch.randn_like(out)
    assert_close("out", out, expected)
    assert_close("dqkv", torch.autograd.grad(out, qkv, weight)[0], torch.autograd.grad(expected, exact, weight.double())[0])


def test_two_backward_passes_are_the_same_bits(seed):
    from bitlm_dist.kernels import triton_attention

    inputs = [torch.randn(1, heads, 1024, 64, dtype=torch.bfloat16, device=DEVICE, requires_grad=True) for heads in (4, 2, 2)]
    out = triton_attention.block_causal_attention(*inputs, block=4)
    weight = torch.randn_like(out)
    first, second = (torch.autograd.grad(out, inputs, weight, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
