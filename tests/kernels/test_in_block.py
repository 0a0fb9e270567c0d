"""Both backends against fp64.

test_triton.py runs this file again, for the Triton kernels in the interpreter.
"""

import pytest
import torch

from bitlm_dist.kernels import in_block_attention
from bitlm_dist.kernels.attention import unavailable_reason

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = {"float32": 1e-5, "float16": 3e-3} | ({"bfloat16": 2e-2} if ON_GPU else {})
BACKENDS = ["torch"] if unavailable_reason("triton") else ["torch", "triton"]

# the products of torch round to the dtype of their inputs, so half precision would not meet the
# tolerance
PAIRS = [
    (name, dtype)
    for name in BACKENDS
    for dtype in TOLERANCE
    if name != "torch" or dtype == "float32"
]

# number of blocks, m, head dim
SIZES = [(1, 1, 16), (130, 3, 64), (5, 4, 16), (33, 4, 128), (17, 8, 24), (9, 16, 64), (3, 64, 128)]


@pytest.mark.parametrize(("backend", "dtype"), PAIRS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("blocks", "block", "width"), SIZES)
def test_forward_and_gradient(blocks, block, width, causal, backend, dtype, seed):
    qkv = torch.randn(
        2,
        blocks,
        block,
        3,
        2,
        width,
        dtype=getattr(torch, dtype),
        device=DEVICE,
        requires_grad=True,
    )

    exact = qkv.detach().double().requires_grad_()
    q, k, v = (x.transpose(-2, -3) for x in exact.unbind(-3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal
    ).transpose(-2, -3)

    out = in_block_attention(qkv, block, causal, backend=backend)
    weight = torch.randn_like(out)
    found = (out, torch.autograd.grad(out, qkv, weight)[0])
    right = (expected, torch.autograd.grad(expected, exact, weight.double())[0])
    for x, y in zip(found, right, strict=True):
        assert (x.double() - y).abs().max() / y.abs().max() < TOLERANCE[dtype]

    # without gradients the torch backend takes another path
    with torch.no_grad():
        torch.testing.assert_close(in_block_attention(qkv, block, causal, backend=backend), out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, seed):
    wide = torch.randn(6, 4, 3, 2, 40, device=DEVICE, requires_grad=True)
    for qkv in (
        wide[..., :32],
        wide[::2, :, :, :, 8:],
        wide.transpose(0, 1)[:, :4],
        wide.mT[..., :2, :].mT[:0],
    ):
        block = qkv.shape[1]
        out, expected = (
            in_block_attention(qkv, block, backend=name) for name in (backend, "torch")
        )
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(x.sum(), wide)[0] for x in (out, expected))
        )


def test_wrong_arguments_are_named():
    with pytest.raises(
        ValueError, match=r"qkv \(3, 2, 3, 2, 8\): expected \[\.\.\., 4, 3, heads, head_dim\]"
    ):
        in_block_attention(torch.zeros(3, 2, 3, 2, 8), 4)
    with pytest.raises(
        ValueError,
        match=r"backend 'cuda' does not exist: choose from auto, triton, torch$",
    ):
        in_block_attention(torch.zeros(3, 2, 3, 2, 8), 2, backend="cuda")
    if "triton" not in BACKENDS:
        with pytest.raises(
            ValueError, match="backend 'triton': there is no CUDA device; torch would take it"
        ):
            in_block_attention(torch.zeros(3, 2, 3, 2, 8), 2, backend="triton")
