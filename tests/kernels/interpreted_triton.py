"""Guarantees of the Triton kernels alone, in Triton's interpreter.

test_triton.py runs this file in a separate process.
"""

import pytest
import torch
from torch.library import opcheck

from bitlm_dist.kernels import (
    block_causal_attention,
    bounds_of_documents,
    in_block_attention,
    triton_attention,
    triton_in_block,
)
from bitlm_dist.kernels.attention_inputs import validate_inputs, visible_key_ranges


@pytest.fixture(autouse=True)
def _seeded(seed):
    """Draw random inputs from a printed seed."""


def tensors(length, heads, kv_heads, width, batch=2):
    return [
        torch.randn(batch, count, length, width, requires_grad=True)
        for count in (heads, kv_heads, kv_heads)
    ]


def documents(batch, keys, length):
    return (torch.rand(batch, keys) < 1 / length).cumsum(1)


def test_the_log_sum_exp_and_its_gradient():
    inputs = tensors(70, 4, 4, 16)
    ids = documents(2, 70, 20)
    weight = torch.randn(2, 4, 70)

    def expected(q, k, v):
        low, high = (
            x[:, None, :, None] for x in visible_key_ranges(validate_inputs(q, k, v, 4, ids))
        )
        at = torch.arange(70)
        return (q @ k.mT * 0.7).masked_fill((at < low) | (at >= high), -torch.inf).logsumexp(-1)

    out, lse = triton_attention.attention_with_lse(validate_inputs(*inputs, 4, ids, scale=0.7))

    exact = [x.detach().double().requires_grad_() for x in inputs]
    right = expected(*exact)
    torch.testing.assert_close(lse, right.float())

    # both outputs contribute to the gradients
    attended = block_causal_attention(
        *exact, block=4, document_ids=ids, scale=0.7, backend="reference"
    )
    gradients = torch.autograd.grad(out.sum() + (lse * weight).sum(), inputs, retain_graph=True)
    both = torch.autograd.grad(attended.sum() + (right * weight).sum(), exact, retain_graph=True)
    for gradient, expected_gradient in zip(gradients, both, strict=True):
        torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-4, atol=1e-5)

    # the log-sum-exp alone does not depend on the values
    dq, _, dv = torch.autograd.grad(lse.sum(), inputs)
    assert dq.any()
    assert dv.eq(0).all()


def test_no_tile_is_visited_that_need_not_be():
    ids = (torch.arange(512) >= 256).long()[None]
    q, k, v = tensors(512, 1, 1, 64, batch=1)

    # NaN in the future of the first tile of queries, and outside the document of the last two
    with torch.no_grad():
        k[:, :, 128:256] = torch.nan

    out = block_causal_attention(q, k, v, block=4, document_ids=ids, backend="triton")
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))

    for name, x in (("out", out), ("dq", dq)):
        assert x[:, :, :128].isfinite().all(), name
        assert x[:, :, 128:256].isnan().all(), name
        assert x[:, :, 256:].isfinite().all(), name

    # these keys belong to another document than the queries that attend to NaN
    assert dk[:, :, 256:].isfinite().all()
    assert dv[:, :, 256:].isfinite().all()


def test_operators_obey_torch():
    q, k, v = tensors(8, 2, 1, 16, batch=1)
    bounds = bounds_of_documents(documents(1, 8, 3))
    opcheck(torch.ops.bitlm.block_causal_attention.default, (q[:, :, 2:], k, v, bounds, 2, 0.25))

    assert triton_in_block.INTERPRETED
    opcheck(
        torch.ops.bitlm.in_block_attention.default,
        (torch.randn(3, 4, 3, 2, 16, requires_grad=True), True),
    )


def test_compile_does_not_break_the_graph():
    def model(q, k, v, bounds, qkv):
        attended = block_causal_attention(
            q * 2, k, v, block=2, document_bounds=bounds, backend="triton"
        )
        return (
            attended.square().sum()
            + in_block_attention(qkv * 2, 4, backend="triton").square().sum()
        )

    # fullgraph makes a graph break an error
    bounds = bounds_of_documents(documents(2, 8, 3))
    inputs = [*tensors(8, 2, 1, 16), bounds, torch.randn(3, 4, 3, 2, 16, requires_grad=True)]
    differentiated = [x for x in inputs if x.requires_grad]

    expected = torch.autograd.grad(model(*inputs), differentiated)
    got = torch.autograd.grad(
        torch.compile(model, backend="aot_eager", fullgraph=True)(*inputs), differentiated
    )

    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_limits_are_named():
    q, k, v = tensors(8, 4, 2, 16)
    with pytest.raises(
        ValueError,
        match=r"'triton': head dim 8, it supports \(16, 32, 64, 128\); "
        "merge, reference would take",
    ):
        block_causal_attention(q[..., :8], k[..., :8], v[..., :8], block=2, backend="triton")
    with pytest.raises(ValueError, match=r"'triton': q, k and v are torch.float64, it supports"):
        block_causal_attention(q.double(), k.double(), v.double(), block=2, backend="triton")
    with pytest.raises(
        ValueError, match=r"'triton': k has strides .* contiguous; merge, reference would take it"
    ):
        block_causal_attention(q, k.mT.contiguous().mT, v, block=2, backend="triton")

    with pytest.raises(
        ValueError, match="'triton': head dim 160, it supports up to 128; torch would take it"
    ):
        in_block_attention(torch.zeros(3, 2, 3, 2, 160), 2, backend="triton")
    with pytest.raises(
        ValueError, match="'triton': blocks of 65 tokens, it supports up to 64; torch would take it"
    ):
        in_block_attention(torch.zeros(1, 65, 3, 2, 16), 65, backend="triton")
