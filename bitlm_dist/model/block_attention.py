"""Block-causal attention as a Megatron core attention, with a key-value cache for decoding.

Legend: S queries, T keys, B batch, H heads, G key-value heads, D width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bitlm_dist.kernels import block_causal_attention


class KeyValueCache:
    """The keys and values of one layer, in a buffer that doubles when it is full.

    ``append`` takes and returns [B, G, S, D] tensors.
    """

    def __init__(self) -> None:
        self.length = 0
        self._buffer: Tensor | None = None  # [2, B, G, capacity, D]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``key`` and ``value`` at the end; returns all keys and values so far."""
        new = torch.stack((key, value))
        end = self.length + new.shape[3]
        if self._buffer is None or end > self._buffer.shape[3]:
            buffer = new.new_empty(*new.shape[:3], max(64, 2 * end), new.shape[4])
            if self._buffer is not None:
                buffer[:, :, :, : self.length] = self._buffer[:, :, :, : self.length]
            self._buffer = buffer
        self._buffer[:, :, :, self.length : end] = new
        self.length = end
        keys, values = self._buffer[:, :, :, :end]
        return keys, values


class BlockCausalAttention(nn.Module):
    """Megatron's ``core_attention`` slot: full attention inside a block of m tokens, causal across blocks (paper, section 3.2).

    Megatron hands ``attention_mask`` through untouched; here it carries the document ids [B, S] of packed sequences, or None.
    The mask itself is computed inside the kernel from positions and these ids.
    """

    def __init__(self, *, config: Any, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.block: int = config.block_size
        self.backend: str = config.attention_backend
        self.scale = softmax_scale
        self.cache: KeyValueCache | None = None  # set while decoding

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> Tensor:
        """query [S, B, H, D], key and value [S, B, G, D] -> [S, B, H·D]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.cache is not None:
            k, v = self.cache.append(k, v)
        out = block_causal_attention(q, k, v, block=self.block, document_ids=attention_mask, scale=self.scale, backend=self.backend)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
