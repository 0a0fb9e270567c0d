"""The backbone while decoding: a key-value cache, and Megatron's weights without Megatron's layers.

Legend: B batch, S new tokens, T all tokens so far, D hidden size, H query heads, G key-value heads,
E head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from bitlm_dist.kernels import block_causal_attention, decode_attention
from bitlm_dist.model.config import ModelConfig
from bitlm_dist.model.torch_layer import LayerWeights, rms_norm, rotary_cos_sin, transformer_layer


class KeyValueCache:
    """Keys and values of one layer, in a buffer that doubles when it is full."""

    def __init__(self) -> None:
        self.length = 0
        self._buffer: Tensor | None = None  # [2, B, G, capacity, E]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``key`` and ``value`` [B, G, S, E].

        Returns:
            All keys and all values so far, each [B, G, T, E].
        """
        end = self.length + key.shape[2]

        # Doubling makes the copies cost amortized constant time per token.
        if self._buffer is None or end > self._buffer.shape[3]:
            buffer = key.new_empty(2, *key.shape[:2], max(64, 2 * end), key.shape[3])
            if self._buffer is not None:
                buffer[:, :, :, : self.length] = self._buffer[:, :, :, : self.length]
            self._buffer = buffer

        self._buffer[0, :, :, self.length : end] = key
        self._buffer[1, :, :, self.length : end] = value
        self.length = end
        return self._buffer[0, :, :, :end], self._buffer[1, :, :, :end]


class CachedBackbone:
    """Incremental, gradient-free forward pass of Megatron's ``TransformerBlock`` on one process.

    Args:
        block: Megatron's block, whose weights are read.
        model_config: the config that it was built from.
    """

    def __init__(self, block: Any, model_config: ModelConfig) -> None:
        self._model_config = model_config
        self._layers = [_layer_weights(megatron_layer) for megatron_layer in block.layers]
        self._final_norm_weight = block.final_layernorm.weight
        self._caches = [KeyValueCache() for _ in self._layers]

    def __call__(self, embedded: Tensor) -> Tensor:
        """Run the layers on the next S tokens.

        Args:
            embedded: [B, S, D].

        Returns:
            Hidden states [B, S, D] after the final norm.
        """
        b = self._model_config.backbone
        block_size = self._model_config.block_size if self._model_config.attention == "block" else 1

        num_cached = self._caches[0].length
        positions = torch.arange(num_cached, num_cached + embedded.shape[1], device=embedded.device)
        cos, sin = rotary_cos_sin(
            positions[:, None, None], b.rope_theta, b.head_dim, embedded.dtype
        )

        x = embedded
        for weights, cache in zip(self._layers, self._caches, strict=True):

            def attend(q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache = cache) -> Tensor:
                """Attend to the cached tokens and the new ones."""
                k, v = cache.append(k, v)
                # The prompt is a full forward pass, so the training kernel handles it.
                if num_cached == 0:
                    return block_causal_attention(q, k, v, block=block_size, backend=b.attention)
                return decode_attention(q, k, v, block=block_size)

            x = transformer_layer(x, weights, cos, sin, attend, b.num_kv_heads)
        return rms_norm(x, self._final_norm_weight)


def _layer_weights(megatron_layer: Any) -> LayerWeights:
    """Collect the weights of one of Megatron's layers."""
    attention = megatron_layer.self_attention
    mlp = megatron_layer.mlp

    # One norm for queries and key together: the rows match the heads of a query group.
    queries_per_group = attention.config.num_attention_heads // attention.config.num_query_groups
    with torch.no_grad():
        qk_norm = torch.cat(
            (
                attention.q_layernorm.weight.expand(queries_per_group, -1),
                attention.k_layernorm.weight[None],
            )
        )

    return LayerWeights(
        megatron_layer.input_layernorm.weight,
        attention.linear_qkv.weight,
        qk_norm,
        attention.linear_proj.weight,
        megatron_layer.pre_mlp_layernorm.weight,
        mlp.linear_fc1.weight,
        mlp.linear_fc2.weight,
    )
