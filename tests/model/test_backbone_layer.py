"""Our layer on Megatron's modules computes what Megatron's own layer does."""

import pytest
import torch
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer

from bitlm_dist.model.backbone_layer import RMSNorm, layer_spec
from bitlm_dist.model.torch_layer import rotary_cos_sin

STEPS = ["layernorm", "qk_layernorm", "mlp_act", "mlp"]
SELECTIVE = ("--parallel.activation_checkpointing", "selective", "--parallel.recompute_modules")


def megatrons_layer(ours):
    """Megatron's layer with the weights of ours."""
    spec = layer_spec("fp32")
    spec.module = TransformerLayer
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.q_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.k_layernorm = RMSNorm
    layer = build_module(spec, config=ours.config).double()
    layer.load_state_dict(ours.state_dict())
    return layer


def test_a_layer_equals_megatrons(tiny_model, seed):
    layer = tiny_model().backbone.block.layers[0].double()
    head_dim = layer.self_attention.hidden_size_per_attention_head
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    x = torch.randn(16, 2, 32, dtype=torch.float64, requires_grad=True)

    positions = torch.arange(16, dtype=torch.float64)[:, None, None]
    frequencies = 10_000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = (positions[..., None] * frequencies).repeat(1, 1, 1, 2)
    cos_sin = torch.stack(rotary_cos_sin(positions[..., None], 10_000, head_dim, torch.float64))

    found = {}
    for name, module, rotary in (
        ("ours", layer, cos_sin),
        ("Megatron's", megatrons_layer(layer), angles),
    ):
        out, _ = module(hidden_states=x, attention_mask=None, rotary_pos_emb=rotary)
        weights = dict(module.named_parameters())
        grads = torch.autograd.grad(out.square().sum(), [x, *weights.values()])
        found[name] = {"out": out, **dict(zip(["x", *weights], grads, strict=True))}

    assert list(found["ours"]) == list(found["Megatron's"])
    for name, tensor in found["ours"].items():
        torch.testing.assert_close(tensor, found["Megatron's"][name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [STEPS[:3], STEPS, [], *([step] for step in STEPS)], ids=str)
def test_recomputing_steps_changes_no_gradient(steps, tiny_model, seed):
    kept = tiny_model().backbone.double()
    again = tiny_model(*SELECTIVE, str(steps)).backbone.double()
    again.load_state_dict(kept.state_dict())
    embedded = torch.randn(16, 2, 32, dtype=torch.float64)

    for backbone in (kept, again):
        backbone(embedded.clone().requires_grad_(), None, 16).square().sum().backward()
    for (name, weight), other in zip(kept.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other.grad, weight.grad, rtol=1e-12, atol=1e-12, msg=name)
