"""The causal Transformer over blocks: Megatron-core's TransformerBlock with a Qwen-3 layer and block-causal attention.

Legend: B batch, S tokens of this rank, L tokens of the sequence, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.kernels import bounds_of_documents
from bitlm_dist.model.block_attention import BlockCausalAttention
from bitlm_dist.model.decoding import Decoder
from bitlm_dist.model.plain_layer import rotary_angles
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ALONE, Layout, Stage

if TYPE_CHECKING:
    from bitlm_dist.config import Config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of weights and activations, by training.precision


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


def _transformer_config(config: "Config", layout: Layout, layers_per_stage: list[int]) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    @dataclass
    class BackboneConfig(TransformerConfig):  # type: ignore[misc]
        """Megatron's configuration and what the core attention reads from it."""

        block_size: int = 1
        attention_backend: str = "auto"
        layout: Layout = ALONE

    model, parallel, backbone = config.model, config.parallel, config.model.backbone
    on_cpu, interleaved = mesh.device().type == "cpu", layout.virtual > 1
    dtype = DTYPES[config.training.precision]
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
        perform_initialization=False,  # initialization.py draws the same weights for every layout
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=not on_cpu,
        apply_rope_fusion=False,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence,
        context_parallel_size=layout.context,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if interleaved else None,
        pipeline_model_parallel_layout=_stages(layers_per_stage) if layout.pipeline > 1 else None,
        batch_p2p_comm=not on_cpu and not interleaved,  # on gloo interleaved stages exchange wrong tensors with it, silently
        batch_p2p_sync=False,  # would wait for the whole device after every exchange, for the sake of an old PyTorch
        overlap_p2p_comm=not on_cpu and interleaved,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True,  # the loss is normalised before the backward pass; nobody scales the gradient again
        recompute_granularity=None if parallel.recompute == "none" else parallel.recompute,
        recompute_method="uniform" if parallel.recompute == "full" else None,
        recompute_num_layers=1 if parallel.recompute == "full" else None,
        block_size=model.block_size if model.attention == "block" else 1,
        attention_backend=backbone.attention,
        layout=layout,
    )


def _stages(layers_per_stage: list[int]) -> list[list[str]]:
    """Megatron's notation of what each stage holds."""
    stages = [["decoder"] * count for count in layers_per_stage]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


class Backbone(nn.Module):
    """The layers of one stage: embedded tokens -> the hidden states C that condition the next block (paper, section 3.2).

    Tensors are in Megatron's order [S, B, D], S the tokens that this rank holds. On the meta device (``torch.device("meta")`` as
    the default device) no weight is allocated.
    """

    def __init__(self, config: "Config", layout: Layout, stage: Stage, layers_per_stage: list[int]) -> None:
        super().__init__()
        mesh.initialize(layout)
        from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

        self.megatron_config = _transformer_config(config, layout, layers_per_stage)
        self.block = TransformerBlock(
            self.megatron_config,
            TransformerBlockSubmodules(layer_specs=[_layer_spec() for _ in stage.layers], layer_norm=RMSNorm),
            pre_process=stage.embeds,
            post_process=stage.predicts,
            vp_stage=stage.chunk if layout.virtual > 1 else None,
        )
        self._model, self._layout = config.model, layout
        self._decoder: Decoder | None = None

    def forward(self, embedded: Tensor | None, document_ids: Tensor | None, length: int) -> Tensor:
        """embedded [S, B, D] (None: what the stage before sent), document_ids [B, L] or None -> hidden states [S, B, D].

        The last stage's are those after the final norm. L is ``length``, a multiple of the block size. Inside :meth:`decoding`, the
        S tokens continue those of the calls before.
        """
        if self._decoder is not None:
            assert embedded is not None
            assert document_ids is None, "decoding reads one document a row"
            return self._decoder(embedded.transpose(0, 1)).transpose(0, 1)
        given = document_ids if embedded is None else embedded
        assert given is not None, "a later stage is told of the documents"
        b, mine = self._model.backbone, self._layout.positions(length, given.device)
        bounds = None if document_ids is None else bounds_of_documents(document_ids)  # once for all layers
        positions = mine[:, None]  # of all rows
        if b.rope_reset and bounds is not None:
            positions = positions - bounds[0, :, mine].T
        angles = rotary_angles(positions, b.rope_base, b.head_width)
        hidden: Tensor = self.block(embedded, bounds, rotary_pos_emb=angles.unsqueeze(2))
        return hidden

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While open, every forward call appends to a key-value cache and attends to all that came before."""
        assert self._layout.world == 1, "text is written by one process"
        self._decoder = Decoder(self.block, self._model)
        try:
            yield
        finally:
            self._decoder = None
