"""One Qwen-3 layer on Megatron-core's modules. Imports Megatron-core.

The layer calls Megatron's linear layers, which hold the weights and communicate, and does the rest
in the regions of :mod:`bitlm_dist.model.fused_regions`.

Legend: S tokens on this rank, B batch, D hidden size, F intermediate size, H query heads and G
key-value heads on this rank, R = H / G, E head dimension.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn
from typing_extensions import override

from bitlm_dist.model.block_attention import BlockCausalAttention
from bitlm_dist.model.fused_regions import RMS_NORM_EPS, add_and_norm, norm_and_rotate, swiglu
from bitlm_dist.model.recomputation import Outputs, recomputed
from bitlm_dist.model.transformer_engine import parallel_linears


class RMSNorm(nn.RMSNorm):
    """RMSNorm with Megatron's constructor; Megatron's own wrapper rejects sequence parallelism."""

    def __init__(
        self, hidden_size: int, config: Any, eps: float = RMS_NORM_EPS, **unused: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class FusedRMSNorm(RMSNorm):
    """RMSNorm that a region applies.

    Calling it returns its weight, so that Megatron's hooks run: they wait for the weight if it is
    still being gathered.
    """

    @override
    def forward(self) -> Tensor:  # type: ignore[override]
        return self.weight


class BackboneLayer(TransformerLayer):  # type: ignore[misc]
    """Pre-norm attention with QK-norm and rotary positions, then SwiGLU."""

    @override
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Run the layer.

        Args:
            hidden_states: [S, B, D].
            attention_mask: bounds [2, B, L] of packed documents, or None.
            rotary_pos_emb: cosines and signed sines [2, S, 1, 1, 1, E].

        Returns:
            Hidden states [S, B, D], and None in place of Megatron's cross-attention context.
        """
        assert rotary_pos_emb is not None
        attention = self.self_attention

        # attention
        with self._step("layernorm", self.input_layernorm, hidden_states) as normed:
            qkv, _ = attention.linear_qkv(normed)

        # each key-value head's R queries, then its key and value
        head_dim = attention.hidden_size_per_attention_head
        num_groups = attention.num_query_groups_per_partition
        qkv = qkv.unflatten(-1, (num_groups, -1, head_dim))
        *qk, value = qkv.split((qkv.shape[-2] - 2, 1, 1), -2)
        with self._step("qk_layernorm", self._rotate, *qk, rotary_pos_emb) as (query, key):
            attended = attention.core_attention(
                query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3), attention_mask
            )
        branch, _ = attention.linear_proj(attended)

        # SwiGLU
        with self._step("layernorm", self._add_and_norm, hidden_states, branch) as (
            hidden_states,
            normed,
        ):
            activation = (
                self._step("mlp", self._activation, normed)
                if "mlp" in self.config.steps_to_recompute
                else self._step("mlp_act", swiglu, self._gate_and_up(normed))
            )
            with activation as activated:
                branch, _ = self.mlp.linear_fc2(activated)

        return hidden_states + branch, None

    def _step(
        self, name: str, function: Callable[..., Outputs], *inputs: Tensor
    ) -> AbstractContextManager[Any]:
        """Run a step of the layer.

        Returns:
            Context manager that yields the outputs and encloses their first use; if
            ``parallel.recompute_modules`` names the step, they are not kept for the backward pass.
        """
        if name in self.config.steps_to_recompute and self.training:
            return recomputed(function, *inputs)
        return nullcontext(function(*inputs))

    def _rotate(self, query: Tensor, key: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Norm and rotate queries [S, B, G, R, E] and keys [S, B, G, 1, E]."""
        attention = self.self_attention
        cos, sin = rotary
        return (
            norm_and_rotate(query, attention.q_layernorm(), cos, sin),
            norm_and_rotate(key, attention.k_layernorm(), cos, sin),
        )

    def _add_and_norm(self, residual: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return add_and_norm(residual, branch, self.pre_mlp_layernorm())

    def _gate_and_up(self, normed: Tensor) -> Tensor:
        gate_and_up: Tensor = self.mlp.linear_fc1(normed)[0]
        return gate_and_up

    def _activation(self, normed: Tensor) -> Tensor:
        return swiglu(self._gate_and_up(normed))


def layer_spec(precision: str) -> Any:
    """Return Megatron's spec of the layer, with block-causal core attention.

    Args:
        precision: ``training.precision``, which decides the class of the linear maps.
    """
    column_linear, row_linear = parallel_linears(precision)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column_linear,
            core_attention=BlockCausalAttention,
            linear_proj=row_linear,
            q_layernorm=FusedRMSNorm,
            k_layernorm=FusedRMSNorm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=column_linear, linear_fc2=row_linear),
    )

    return ModuleSpec(
        module=BackboneLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=FusedRMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
