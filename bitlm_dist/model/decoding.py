"""The backbone while it writes text: keys and values are kept, and Megatron's weights run without Megatron's layers.

Legend: B batch, S new tokens, T all tokens so far, D width, H query heads, G key-value heads, E width of a head.
"""

from typing import Any

import torch
from torch import Tensor

from bitlm_dist.config import ModelConfig
from bitlm_dist.kernels import block_causal_attention, decode_attention
from bitlm_dist.model.plain_layer import LayerWeights, layer, rms_norm, rotary


class KeyValueCache:
    """The keys and values of one layer, in a buffer that doubles when it is full.

    ``append`` takes and returns [B, G, S, E] tensors.
    """

    def __init__(self) -> None:
        self.length = 0
        self._buffer: Tensor | None = None  # [2, B, G, capacity, E]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``key`` and ``value`` at the end; returns all keys and values so far."""
        end = self.length + key.shape[2]
        if self._buffer is None or end > self._buffer.shape[3]:
            buffer = key.new_empty(2, *key.shape[:2], max(64, 2 * end), key.shape[3])
            if self._buffer is not None:
                buffer[:, :, :, : self.length] = self._buffer[:, :, :, : self.length]
            self._buffer = buffer
        self._buffer[0, :, :, self.length : end] = key
        self._buffer[1, :, :, self.length : end] = value
        self.length = end
        return self._buffer[0, :, :, :end], self._buffer[1, :, :, :end]


class Decoder:
    """The layers of Megatron's ``TransformerBlock`` on one process, token after token, without gradient.

    Args:
        block: Megatron's, whose weights are read.
        model: the config it was built from.
    """

    def __init__(self, block: Any, model: ModelConfig) -> None:
        self._model = model
        self._layers = [_weights(megatron_layer) for megatron_layer in block.layers]
        self._norm = block.final_layernorm.weight
        self._caches = [KeyValueCache() for _ in self._layers]

    def __call__(self, embedded: Tensor) -> Tensor:
        """embedded [B, S, D] of the next S tokens -> hidden states [B, S, D] after the final norm."""
        b = self._model.backbone
        block = self._model.block_size if self._model.attention == "block" else 1
        first = self._caches[0].length
        cos, sin = rotary(first, first + embedded.shape[1], b.rope_base, b.head_width, embedded)
        x = embedded
        for weights, cache in zip(self._layers, self._caches, strict=True):

            def attend(q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache = cache) -> Tensor:
                k, v = cache.append(k, v)
                if first == 0:
                    return block_causal_attention(q, k, v, block=block, backend=b.attention)
                return decode_attention(q, k, v, block=block)

            x = layer(x, weights, cos, sin, attend, b.kv_heads)
        return rms_norm(x, self._norm)


def _weights(megatron_layer: Any) -> LayerWeights:
    attention, mlp = megatron_layer.self_attention, megatron_layer.mlp
    per_group = attention.config.num_attention_heads // attention.config.num_query_groups
    with torch.no_grad():
        qk_norm = torch.cat((attention.q_layernorm.weight.expand(per_group, -1), attention.k_layernorm.weight[None]))
    return LayerWeights(
        megatron_layer.input_layernorm.weight,
        attention.linear_qkv.weight,
        qk_norm,
        attention.linear_proj.weight,
        megatron_layer.pre_mlp_layernorm.weight,
        mlp.linear_fc1.weight,
        mlp.linear_fc2.weight,
    )
