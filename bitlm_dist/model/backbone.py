"""The causal Transformer over blocks: Megatron-core's TransformerBlock with a Qwen-3 layer and block-causal attention.

Legend: B batch, S sequence, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.model.block_attention import BlockCausalAttention
from bitlm_dist.model.decoding import Decoder
from bitlm_dist.parallel import mesh

if TYPE_CHECKING:
    from bitlm_dist.config import ModelConfig


class RMSNorm(nn.RMSNorm):
    """RMSNorm with Megatron's constructor; its own one refuses sequence parallelism."""

    def __init__(self, hidden_size: int, config: Any, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _layer_spec() -> Any:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=BlockCausalAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=RMSNorm,
                    k_layernorm=RMSNorm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _transformer_config(model: "ModelConfig") -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    @dataclass
    class BackboneConfig(TransformerConfig):  # type: ignore[misc]
        """Megatron's configuration and what the core attention reads from it."""

        block_size: int = 1
        attention_backend: str = "auto"

    backbone = model.backbone
    on_cpu = mesh.device().type == "cpu"
    return BackboneConfig(
        num_layers=backbone.layers,
        hidden_size=backbone.width,
        num_attention_heads=backbone.heads,
        num_query_groups=backbone.kv_heads,
        kv_channels=backbone.head_width,
        ffn_hidden_size=backbone.ffn_width,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,  # initialization.py draws the same weights on every device
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=not on_cpu,
        apply_rope_fusion=False,
        batch_p2p_sync=not on_cpu,
        pipeline_dtype=torch.float32,
        block_size=model.block_size if model.attention == "block" else 1,
        attention_backend=backbone.attention,
    )


class Backbone(nn.Module):
    """Embedded tokens -> the hidden states C that condition the next block (paper, section 3.2).

    On the meta device (``torch.device("meta")`` as the default device) no weight is allocated.
    """

    def __init__(self, model: "ModelConfig") -> None:
        super().__init__()
        mesh.initialize()
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
        from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

        config = _transformer_config(model)
        layers = [_layer_spec() for _ in range(model.backbone.layers)]
        self.block = TransformerBlock(config, TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm))
        self.rotary = RotaryEmbedding(
            model.backbone.head_width, 1.0, rotary_base=model.backbone.rope_base, use_cpu_initialization=True
        )
        self._model = model
        self._decoder: Decoder | None = None

    def forward(self, embedded: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """embedded [B, S, D], document_ids [B, S] or None -> hidden states [B, S, D] after the final norm.

        S is a multiple of the block size. Inside :meth:`decoding`, the S tokens continue those of the calls before.
        """
        if self._decoder is not None:
            assert document_ids is None, "decoding reads one document a row"
            return self._decoder(embedded)
        positions = self.rotary(embedded.shape[1])
        hidden: Tensor = self.block(embedded.transpose(0, 1).contiguous(), document_ids, rotary_pos_emb=positions)
        return hidden.transpose(0, 1)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While open, every forward call appends to a key-value cache and attends to all that came before."""
        self._decoder = Decoder(self.block, self._model)
        try:
            yield
        finally:
            self._decoder = None
