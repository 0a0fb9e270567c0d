"""Packing of documents for the flash attention of GPUs, tested on a CPU: the operators are replaced
by their definition.
"""

from functools import partial

import pytest
import torch

from bitlm_dist.kernels import block_causal_attention, flash, lse_merge
from bitlm_dist.kernels.attention_inputs import validate_inputs


def definition(
    q, k, v, queries, keys, longest_query, longest_key, dropout, causal, debug, *, scale
):
    """FlashAttention 2: documents by cumulative lengths, causal mask aligned to the bottom right
    corner. Returns the outputs of the operator.
    """
    assert (dropout, causal, debug) == (0.0, True, False)

    # without documents, every row is one
    if queries is None:
        ends = [0, q.shape[1]], [0, k.shape[1]], q.shape[1], k.shape[1]
        rows = [
            definition(*row, *ends, 0.0, True, False, scale=scale)
            for row in zip(q, k, v, strict=True)
        ]
        return (
            torch.stack([row[0] for row in rows]),
            torch.stack([row[1] for row in rows]),
            *rows[0][2:],
        )

    outs = []
    lses = []
    group = q.shape[1] // k.shape[1]
    for a, b, c, d in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        assert b - a <= longest_query
        assert d - c <= longest_key

        mine, theirs, values = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        scores = mine @ theirs.repeat_interleave(group, 0).mT * scale
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + int(d - c) - int(b - a))
        scores = scores.masked_fill(hidden, -torch.inf)
        outs.append((scores.softmax(-1) @ values.repeat_interleave(group, 0)).transpose(0, 1))
        lses.append(scores.logsumexp(-1))

    return torch.cat(outs), torch.cat(lses, 1), torch.zeros(2), torch.zeros(()), torch.zeros(0)


def its_gradient(gradient, q, k, v, out, lse, *sizes, scale):
    """Gradients from the given output and log-sum-exp: with P = exp(S - lse),
    dS = P (dP - sum(gradient * out)).
    """
    *arguments, _, _ = sizes
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        mine, its_lse, *_ = definition(*inputs, *arguments, False, scale=scale)

        # fraction of this softmax in the full one, [H, S]
        share = (its_lse - lse).exp().detach()
        more = share * ((mine.detach() - out) * gradient).sum(-1).mT
        loss = (mine * gradient * share.mT.unsqueeze(-1)).sum() + (more * its_lse).sum()
        return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize(
    ("queries", "keys", "block"), [(24, 24, 4), (25, 25, 3), (9, 24, 3), (24, 24, 1)]
)
@pytest.mark.parametrize("length", [0, 6])
def test_documents_are_packed_as_the_operator_expects(
    queries, keys, block, length, seed, monkeypatch
):
    monkeypatch.setattr(flash, "_GPU", definition)
    monkeypatch.setattr(flash, "_GPU_BACKWARD", its_gradient)
    monkeypatch.setattr(lse_merge, "select_flash", flash.GPUFlash)

    shapes = [(3, 4, queries, 8), (3, 2, keys, 8), (3, 2, keys, 8)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ids = (torch.rand(3, keys) < 1 / length).cumsum(1) if length else None
    run = partial(block_causal_attention, *inputs, block=block, document_ids=ids)
    out = lse_merge.attention(validate_inputs(*inputs, block, ids))
    expected = run(backend="reference")
    torch.testing.assert_close(out, expected)

    weight = torch.randn_like(out)
    for x, y in zip(
        *(torch.autograd.grad(x, inputs, weight) for x in (out, expected)), strict=True
    ):
        torch.testing.assert_close(x, y)
