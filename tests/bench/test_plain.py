import pytest
import torch

from bitlm_dist.bench.plain import PlainBackbone
from bitlm_dist.model.backbone import Backbone


def copy_weights(plain: PlainBackbone, backbone: Backbone) -> None:
    for ours, layer in zip(plain.layers, backbone.block.layers, strict=True):
        attention, mlp = layer.self_attention, layer.mlp
        for mine, theirs in (
            (ours.norm1, layer.input_layernorm.weight),
            (ours.qkv.weight, attention.linear_qkv.weight),
            (ours.q_norm, attention.q_layernorm.weight),
            (ours.k_norm, attention.k_layernorm.weight),
            (ours.out.weight, attention.linear_proj.weight),
            (ours.norm2, layer.pre_mlp_layernorm.weight),
            (ours.gate_up.weight, mlp.linear_fc1.weight),
            (ours.down.weight, mlp.linear_fc2.weight),
            (plain.norm.weight, backbone.block.final_layernorm.weight),
        ):
            mine.data = theirs.detach()


@pytest.mark.parametrize("attention", ["block", "causal"])
def test_plain_backbone_computes_what_megatrons_does(attention, tiny_model, seed):
    """The two implementations that the bench compares validate each other."""
    model = tiny_model("--model.attention", attention, "--diffusion.next_token_loss_weight", "0")
    for parameter in model.backbone.parameters():
        if parameter.dim() == 1:
            # norm weights other than one tell which is used where
            torch.nn.init.uniform_(parameter, 0.5, 1.5)

    plain = PlainBackbone(model.config.model.backbone, 4 if attention == "block" else 1)
    copy_weights(plain, model.backbone)
    x, ids = torch.randn(2, 32, 32), torch.tensor([[0] * 12 + [1] * 20] * 2)
    torch.testing.assert_close(
        plain(x, ids),
        model.backbone(x.transpose(0, 1), ids, 32).transpose(0, 1),
        rtol=1e-4,
        atol=1e-4,
    )


def test_plain_and_stack_losses_have_the_same_mean(tiny_model, seed):
    """Same weights, independent noise: means over many blocks agree."""
    from bitlm_dist.bench.plain import PlainBitLM
    from bitlm_dist.model.batch import Batch, loss_mask

    model = tiny_model("--data.sequence_length", "512", "--training.global_batch_tokens", "512")
    plain = PlainBitLM(model.config, model.codes)
    copy_weights(plain.backbone, model.backbone)
    plain.embedding.load_state_dict(model.embedding.state_dict())
    plain.head.load_state_dict(model.head.state_dict())
    tokens = torch.randint(2, 300, (16, 512))
    batch = Batch(tokens, torch.zeros_like(tokens), torch.arange(16))
    with torch.no_grad():
        ours = model.loss(batch, seed=1, step=1) / loss_mask(batch, 4, 1).sum()
        torch.testing.assert_close(plain.loss(tokens, batch.document_ids), ours, rtol=0.02, atol=0)
