"""Block-causal attention as a Megatron core attention.

Legend: S tokens of this rank, L tokens of the sequence, B batch, H heads and G key-value heads of this rank, D width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bitlm_dist.kernels import block_causal_attention
from bitlm_dist.kernels.call import first_keys
from bitlm_dist.parallel.layout import Layout


class BlockCausalAttention(nn.Module):
    """Megatron's ``core_attention`` slot: full attention inside a block of m tokens, causal across blocks (paper, section 3.2).

    Megatron hands ``attention_mask`` through untouched; here it carries the bounds [2, B, L] of packed documents, or None. The mask
    itself is computed inside the kernel from positions and these. With context parallelism keys and values of all ranks are
    gathered; queries stay where they are.
    """

    def __init__(self, *, config: Any, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.block: int = config.block_size
        self.backend: str = config.attention_backend
        self.layout: Layout = config.layout
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> Tensor:
        """query [S, B, H, D], key and value [S, B, G, D] -> [S, B, H·D]."""
        if self.layout.context == 1:
            out = self._attend(query, key, value, attention_mask)
        else:
            out = self._attend_across(query, key, value, attention_mask)
        return out.reshape(query.shape[0], query.shape[1], -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = block_causal_attention(q, k, v, block=self.block, document_bounds=bounds, scale=self.scale, backend=self.backend)
        return out.permute(2, 0, 1, 3)

    def _attend_across(self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None) -> Tensor:
        """Each of the two pieces that this rank holds, against all keys up to the piece's end."""
        from megatron.core.parallel_state import get_context_parallel_group
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        layout, piece = self.layout, query.shape[0] // 2
        both = gather_from_sequence_parallel_region(torch.cat((key, value), -1), group=get_context_parallel_group())
        keys, values = both[layout.places(len(both), both.device)].chunk(2, -1)
        out = []
        for q, number in zip(query.split(piece), layout.pieces(), strict=True):
            end = (number + 1) * piece
            out.append(self._attend(q, keys[:end], values[:end], None if bounds is None else first_keys(bounds, end)))
        return torch.cat(out)
