"""The causal Transformer over blocks: Qwen-3 layers with block-causal attention, on Megatron-core.

Legend: B batch, S tokens on this rank, L tokens per sequence, D hidden size.
"""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.kernels import bounds_of_documents
from bitlm_dist.model import transformer_engine
from bitlm_dist.model.cached_backbone import CachedBackbone
from bitlm_dist.model.fused_regions import RMS_NORM_EPS
from bitlm_dist.model.initialization import set_layer_distributions
from bitlm_dist.model.torch_layer import rotary_cos_sin
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import SINGLE_PROCESS, ModelChunk, ParallelLayout

if TYPE_CHECKING:
    from bitlm_dist.config import Config
    from bitlm_dist.model.config import ModelConfig
    from bitlm_dist.parallel.config import ParallelConfig

# training.precision -> dtype of the weights and activations
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
}


def _transformer_config(
    config: "Config", layout: ParallelLayout, layers_per_stage: list[int]
) -> Any:
    """Translate the config into Megatron's, with the extra fields that our layer reads."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    @dataclass
    class BackboneConfig(TransformerConfig):  # type: ignore[misc]
        """Megatron's configuration, extended by the fields of our layer."""

        block_size: int = 1
        attention_backend: str = "auto"
        steps_to_recompute: tuple[str, ...] = ()
        layout: ParallelLayout = SINGLE_PROCESS

    dtype = DTYPES[config.training.precision]
    fp8_options = transformer_engine.OPTIONS if config.training.precision == "fp8" else {}

    return BackboneConfig(
        **_architecture_options(config.model),
        **_parallel_options(layout, layers_per_stage),
        **_recompute_options(config.parallel),
        # initialization.py draws the weights; Megatron allocates them on torch's default device
        **{"use_cpu_initialization": True} | fp8_options,
        perform_initialization=False,
        gradient_accumulation_fusion=_has_weight_gradient_kernel(),
        # our layer fuses these itself (fused_regions.py)
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
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
        "layernorm_epsilon": RMS_NORM_EPS,
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


def _recompute_options(parallel: "ParallelConfig") -> dict[str, Any]:
    """Options for activation checkpointing: Megatron's for whole layers, our layer's for steps."""
    if parallel.activation_checkpointing == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }

    is_selective = parallel.activation_checkpointing == "selective"
    return {"steps_to_recompute": parallel.recompute_modules if is_selective else ()}


@functools.cache
def _has_weight_gradient_kernel() -> bool:
    """True if apex's kernel can add weight gradients to the fp32 gradients as it computes them."""
    if mesh.device().type != "cuda":
        return False

    try:
        importlib.import_module("fused_weight_gradient_mlp_cuda")
    except Exception:  # a build for another CUDA version raises errors of many kinds
        return False
    return True


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

        from bitlm_dist.model.backbone_layer import RMSNorm, layer_spec

        self.megatron_config = _transformer_config(config, layout, layers_per_stage)
        self.block = TransformerBlock(
            self.megatron_config,
            TransformerBlockSubmodules(
                layer_specs=[
                    layer_spec(config.training.precision) for _ in model_chunk.layer_range
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
        positions = local_positions[:, None, None, None]
        rotary = torch.stack(
            rotary_cos_sin(positions, b.rope_theta, b.head_dim, self.megatron_config.params_dtype)
        )

        # Megatron passes the bounds to the core attention through its attention mask.
        hidden: Tensor = self.block(embedded, bounds, rotary_pos_emb=rotary)
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
