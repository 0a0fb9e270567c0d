import pytest
import torch
from bitlm_dist.kernels import available_backends, block_causal_attention, in_block_attention


def truth(q, k, v, block, document_ids=None):
    """Token by token in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    group, past = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
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


def tensors(queries, keys, heads=4, kv_heads=2, width=16):
    return torch.randn(2, heads, queries, width), *(torch.randn(2, kv_heads, keys, width) for _ in "kv")


CASES = [(1, 1, 1), (8, 8, 1), (8, 8, 4), (30, 30, 3), (33, 33, 8), (4, 24, 4), (9, 24, 3), (40, 40, 16)]


@pytest.mark.parametrize("backend", available_backends())
@pytest.mark.parametrize(("queries", "keys", "block"), CASES)
@pytest.mark.parametrize("documents", [False, True])
def test_forward_equals_the_definition(backend, queries, keys, block, documents, seed, monkeypatch):
    from bitlm_dist.kernels import attention

    monkeypatch.setattr(attention, "TILE", 8)
    q, k, v = tensors(queries, keys)
    ids = torch.randint(0, 3, (2, -(-keys // block))).repeat_interleave(block, 1)[:, :keys] if documents else None
    out = block_causal_attention(q, k, v, block=block, document_ids=ids, backend=backend)
    torch.testing.assert_close(out.double(), truth(q, k, v, block, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [1, 4])
def test_gradients_agree_between_back_ends(block, seed):
    q, k, v = (x.requires_grad_() for x in tensors(32, 32))
    weight = torch.randn(2, 4, 32, 16)
    grads = [
        torch.autograd.grad((block_causal_attention(q, k, v, block=block, backend=b) * weight).sum(), (q, k, v))
        for b in available_backends()
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_token_blocks_are_causal_attention(seed):
    q, k, v = tensors(50, 50, kv_heads=4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    for backend in available_backends():
        torch.testing.assert_close(block_causal_attention(q, k, v, block=1, backend=backend), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [1, 2, 4, 7])
def test_in_block_attention_equals_sdpa(block, causal, seed):
    qkv = torch.randn(5, 3, block, 3, 2, 8, requires_grad=True)
    q, k, v = (x.transpose(-2, -3) for x in qkv.unbind(-3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(-2, -3)
    out = in_block_attention(qkv, block, causal)
    torch.testing.assert_close(out, expected)
    with torch.no_grad():  # another path, with few blocks
        torch.testing.assert_close(in_block_attention(qkv, block, causal), expected)
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((x * weight).sum(), qkv)[0] for x in (out, expected)]
    torch.testing.assert_close(*grads)


def test_wrong_arguments_are_named():
    q, k, v = tensors(8, 8)
    with pytest.raises(ValueError, match="attention backend 'fa9' is not available"):
        block_causal_attention(q, k, v, block=2, backend="fa9")
    with pytest.raises(ValueError, match="block = 0"):
        block_causal_attention(q, k, v, block=0)
    with pytest.raises(ValueError, match="multiple of block = 4"):
        block_causal_attention(q[:, :, :3], k, v, block=4)
    with pytest.raises(ValueError, match="no multiple of G"):
        block_causal_attention(q[:, :3], k, v, block=4)
    with pytest.raises(ValueError, match="document_ids"):
        block_causal_attention(q, k, v, block=4, document_ids=torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 4, 3, heads, head_width\]"):
        in_block_attention(torch.zeros(3, 2, 3, 2, 8), 4)
