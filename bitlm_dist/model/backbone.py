"""The causal Transformer over blocks: Qwen-3 layers with block-causal attention, on Megatron-core.

Legend: B batch, S tokens on this rank, L tokens per sequence, D hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.kernels import bounds_of_documents
from bitlm_dist.model import transformer_engine
from bitlm_dist.model.block_attention import BlockCausalAttention
from bitlm_dist.model.cached_backbone import CachedBackbone
from bitlm_dist.model.initialization import set_layer_distributions
from bitlm_dist.model.torch_layer import rotary_angles
from bitlm_dist.model.transformer_engine import parallel_linears
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import SINGLE_PROCESS, ModelChunk, ParallelLayout

if TYPE_CHECKING:
    from bitlm_dist.config import Config
    from bitlm_dist.model.config import ModelConfig

# training.precision -> dtype of the weights and activations
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
}


class RMSNorm(nn.RMSNorm):
    """RMSNorm with Megatron's constructor; Megatron's own wrapper rejects sequence parallelism."""

    def __init__(self, hidden_size: int, config: Any, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _layer_spec(precision: str) -> Any:
    """Return Megatron's spec of one Qwen-3 layer, with block-causal core attention."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    column_linear, row_linear = parallel_linears(precision)

    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column_linear,
                    core_attention=BlockCausalAttention,
                    linear_proj=row_linear,
                    q_layernorm=RMSNorm,
                    k_layernorm=RMSNorm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=column_linear, linear_fc2=row_linear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _transformer_config(
    config: "Config", layout: ParallelLayout, layers_per_stage: list[int]
) -> Any:
    """Translate the config into Megatron's, with the extra fields that the core attention reads."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    @dataclass
    class BackboneConfig(TransformerConfig):  # type: ignore[misc]
        """Megatron's configuration, extended by the fields of the core attention."""

        block_size: int = 1
        attention_backend: str = "auto"
        layout: ParallelLayout = SINGLE_PROCESS

    dtype = DTYPES[config.training.precision]
    fp8_options = transformer_engine.OPTIONS if config.training.precision == "fp8" else {}

    return BackboneConfig(
        **_architecture_options(config.model),
        **_parallel_options(layout, layers_per_stage),
        **_recompute_options(config.parallel.activation_checkpointing),
        # initialization.py draws the weights; Megatron allocates them on torch's default device
        **{"use_cpu_initialization": True} | fp8_options,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=mesh.device().type != "cpu",
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # the loss is normalised before the backward pass, so Megatron must not scale the gradient
        calculate_per_token_loss=True,
        block_size=config.model.block_size if config.model.attention == "block" else 1,
        attention_backend=config.model.backbone.attention,
        layout=layout,
    )


def _architecture_options(model: "ModelConfig") -> dict[str, Any]:
    """Megatron's options for a Qwen-3 Transformer of the configured size."""
    backbone = model.backbone

    return {
        "num_layers": backbone.num_layers,
        "hidden_size": backbone.hidden_size,
        "num_attention_heads": backbone.num_heads,
        "num_query_groups": backbone.num_kv_heads,
        "kv_channels": backbone.head_dim,
        "ffn_hidden_size": backbone.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _parallel_options(layout: ParallelLayout, layers_per_stage: list[int]) -> dict[str, Any]:
    """Megatron's options for the parallel layout and the exchange between pipeline stages."""
    is_cpu = mesh.device().type == "cpu"
    is_interleaved = layout.virtual_pipeline > 1
    has_pipeline = layout.pipeline > 1

    return {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence,
        "context_parallel_size": layout.context,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline if is_interleaved else None,
        "pipeline_model_parallel_layout": (
            _megatron_pipeline_layout(layers_per_stage) if has_pipeline else None
        ),
        # on gloo, interleaved stages silently exchange wrong tensors in batched mode
        "batch_p2p_comm": not is_cpu and not is_interleaved,
        # a workaround for an old PyTorch that synchronizes the device after every exchange
        "batch_p2p_sync": False,
        "overlap_p2p_comm": not is_cpu and is_interleaved,
        "deallocate_pipeline_outputs": True,
    }


def _recompute_options(activation_checkpointing: str) -> dict[str, Any]:
    """Megatron's options for activation checkpointing: ``none``, ``selective`` or ``full``."""
    is_full = activation_checkpointing == "full"

    return {
        "recompute_granularity": (
            None if activation_checkpointing == "none" else activation_checkpointing
        ),
        "recompute_method": "uniform" if is_full else None,
        "recompute_num_layers": 1 if is_full else None,
    }


def _megatron_pipeline_layout(layers_per_stage: list[int]) -> list[list[str]]:
    """Contents of each stage in Megatron's notation."""
    stages = [["decoder"] * count for count in layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


class Backbone(nn.Module):
    """The Transformer layers of one pipeline stage.

    Maps embedded tokens to the hidden states C that condition the next block (paper, section 3.2).
    Tensors are in Megatron's order [S, B, D], where S counts the tokens on this rank.
    Under ``torch.device("meta")`` no weight is allocated.
    """

    def __init__(
        self,
        config: "Config",
        layout: ParallelLayout,
        model_chunk: ModelChunk,
        layers_per_stage: list[int],
    ) -> None:
        super().__init__()
        mesh.init_process_groups(layout)
        from megatron.core.transformer.transformer_block import (
            TransformerBlock,
            TransformerBlockSubmodules,
        )

        self.megatron_config = _transformer_config(config, layout, layers_per_stage)
        self.block = TransformerBlock(
            self.megatron_config,
            TransformerBlockSubmodules(
                layer_specs=[
                    _layer_spec(config.training.precision) for _ in model_chunk.layer_range
                ],
                layer_norm=RMSNorm,
            ),
            pre_process=model_chunk.is_first,
            post_process=model_chunk.is_last,
            vp_stage=model_chunk.vp_stage if layout.virtual_pipeline > 1 else None,
        )
        set_layer_distributions(self.block, config.model.backbone.num_layers)

        self._model_config = config.model
        self._layout = layout
        self._cached_backbone: CachedBackbone | None = None  # set while decoding

    def forward(
        self, embedded: Tensor | None, document_ids: Tensor | None, sequence_length: int
    ) -> Tensor:
        """Run the layers of this stage.

        Inside :meth:`decoding`, the S tokens continue those of the previous calls.

        Args:
            embedded: [S, B, D]; None on later stages, which read the tensor received from the
                previous stage.
            document_ids: [B, L]; None if each sequence is one document.
            sequence_length: L, a multiple of the block size.

        Returns:
            Hidden states [S, B, D]; on the last stage, after the final norm.
        """
        if self._cached_backbone is not None:
            assert embedded is not None
            assert document_ids is None, "decoding reads one document per row"
            return self._cached_backbone(embedded.transpose(0, 1)).transpose(0, 1)

        reference = document_ids if embedded is None else embedded
        assert reference is not None, "later stages need the document ids"
        b = self._model_config.backbone
        local_positions = self._layout.local_positions(sequence_length, reference.device)

        # Computed once and shared by all layers. Documents need no positions of their own: rotary
        # positions are relative, and documents do not see each other.
        bounds = None if document_ids is None else bounds_of_documents(document_ids)
        angles = rotary_angles(local_positions, b.rope_theta, b.head_dim)[:, None, None]

        # Megatron passes the bounds to the core attention through its attention mask.
        hidden: Tensor = self.block(embedded, bounds, rotary_pos_emb=angles)
        return hidden

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While open, each forward call extends a key-value cache and attends to all of it."""
        assert self._layout.world_size == 1, "decoding runs on a single process"
        self._cached_backbone = CachedBackbone(self.block, self._model_config)

        try:
            yield
        finally:
            self._cached_backbone = None
