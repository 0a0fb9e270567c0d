import pytest
import torch

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.config_loading import load_config
from bitlm_dist.model.bitlm import BitLM


@pytest.mark.parametrize("block", [1, 2, 4])
def test_token_depends_on_exactly_its_block_and_those_before(block, tiny_model, seed):
    model = tiny_model(
        "--model.block_size",
        str(block),
        "--model.attention",
        "block",
        "--diffusion.next_token_loss_weight",
        "0",
    )
    embedded = torch.randn(1, 16, 32, requires_grad=True)
    hidden = model.backbone(embedded.transpose(0, 1), None, 16).transpose(0, 1)

    for i in (0, 5, 9, 15):
        (grad,) = torch.autograd.grad(hidden[0, i].square().sum(), embedded, retain_graph=True)
        depends = (grad[0] != 0).any(-1).nonzero().flatten().tolist()
        assert depends == list(range((i // block + 1) * block))


def test_causal_attention_sees_no_later_token_of_its_block(tiny_model, seed):
    model = tiny_model("--model.attention", "causal")
    embedded = torch.randn(1, 16, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(
        model.backbone(embedded.transpose(0, 1), None, 16)[9].square().sum(), embedded
    )
    assert (grad[0] != 0).any(-1).nonzero().flatten().tolist() == list(range(10))


def test_documents_in_one_sequence_do_not_see_each_other(tiny_model, seed):
    model = tiny_model()
    tokens = torch.randint(2, 300, (1, 32))
    ids = torch.tensor([[0] * 12 + [1] * 20])
    packed = model.hidden_states(tokens, ids)

    torch.testing.assert_close(
        packed[:, :12], model.hidden_states(tokens[:, :12]), rtol=1e-4, atol=1e-5
    )
    # only differences of rotary positions matter, so the second document needs no reset
    torch.testing.assert_close(
        packed[:, 12:], model.hidden_states(tokens[:, 12:]), rtol=1e-4, atol=1e-5
    )


def test_blocks_of_one_token_are_a_causal_language_model(tiny_model, seed):
    """Compare with torch's causal attention in the core-attention slot, on the same weights."""
    model = tiny_model("--model.block_size", "1")

    class Causal(torch.nn.Module):
        def forward(self, query, key, value, *unused, **unused_too):
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
            return out.permute(2, 0, 1, 3).flatten(2)

    tokens = torch.randint(2, 300, (2, 24))
    ours = model.hidden_states(tokens)
    for layer in model.backbone.block.layers:
        layer.self_attention.core_attention = Causal()

    torch.testing.assert_close(model.hidden_states(tokens), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("splits", [[4] * 6, [8, 4, 12], [24]])
def test_cached_hidden_states_equal_uncached(splits, tiny_model, seed):
    model = tiny_model().eval()
    tokens = torch.randint(2, 300, (2, 24))
    whole = model.hidden_states(tokens)
    with torch.no_grad(), model.backbone.decoding():
        parts = [model.hidden_states(part) for part in tokens.split(splits, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    # afterwards the cache is gone
    torch.testing.assert_close(model.hidden_states(tokens), whole)


SHAPES = {"bitlm-0.6b": 0.6e9, "bitlm-1.7b": 1.7e9, "bitlm-4b": 4e9, "bitlm-8b": 8e9}


@pytest.mark.parametrize("name", SHAPES)
def test_paper_presets_build_on_the_meta_device(name):
    config = load_config(None, ["--preset", "paper"]).config
    assert config.diffusion.loss == "x"

    from pathlib import Path

    config = load_config(Path(name)).config
    assert (config.model.block_size, config.model.bits, config.data.sequence_length) == (
        4,
        18,
        16384,
    )
    assert (
        config.optimizer.adamw_lr,
        config.optimizer.betas,
        config.optimizer.matrix_optimizer,
    ) == (1e-4, (0.9, 0.95), "adamw")

    codes = BitCodes(natural_codes(2), 18)
    with torch.device("meta"):
        model = BitLM(config, codes, eos=0)

    assert all(p.is_meta for p in model.parameters())

    backbone = sum(p.numel() for p in model.backbone.parameters())

    # the public sizes include an embedding table (and its untied copy at 8B), which BitLM lacks
    b = config.model.backbone
    per_layer = (
        b.hidden_size * b.head_dim * (2 * b.num_heads + 2 * b.num_kv_heads)
        + 3 * b.hidden_size * b.ffn_hidden_size
        + 2 * b.hidden_size
        + 2 * b.head_dim
    )

    assert backbone == b.num_layers * per_layer + b.hidden_size

    table = 151_669 * b.hidden_size * (2 if name == "bitlm-8b" else 1)
    assert abs(backbone + table - SHAPES[name]) / SHAPES[name] < 0.03
