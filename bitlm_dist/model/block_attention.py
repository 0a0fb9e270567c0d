"""Block-causal attention as a Megatron core attention.

Legend: S tokens on this rank, L tokens per sequence, B batch, H query heads and G key-value heads
on this rank, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bitlm_dist.kernels import block_causal_attention
from bitlm_dist.kernels.attention_inputs import truncate_bounds
from bitlm_dist.parallel.layout import ParallelLayout


class BlockCausalAttention(nn.Module):
    """Full attention within a block of m tokens, causal across blocks (paper, section 3.2).

    Fills Megatron's ``core_attention`` slot. Megatron passes ``attention_mask`` through unchanged;
    here it carries the bounds [2, B, L] of packed documents, or None. The kernel derives the mask
    itself from these bounds and the positions. With context parallelism, the keys and values of all
    ranks are gathered while the queries stay local.
    """

    def __init__(self, *, config: Any, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.block_size: int = config.block_size
        self.backend: str = config.attention_backend
        self.layout: ParallelLayout = config.layout
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        """Attend with queries [S, B, H, D] to keys and values [S, B, G, D].

        Args:
            attention_mask: bounds [2, B, L] of packed documents, or None.

        Returns:
            [S, B, H·D].
        """
        if self.layout.context == 1:
            out = self._attend(query, key, value, attention_mask)
        else:
            out = self._context_parallel_attention(query, key, value, attention_mask)
        return out.reshape(query.shape[0], query.shape[1], -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None) -> Tensor:
        """Run the kernel, which expects [B, H, S, D]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))

        out = block_causal_attention(
            q,
            k,
            v,
            block=self.block_size,
            document_bounds=bounds,
            scale=self.scale,
            backend=self.backend,
        )

        return out.permute(2, 0, 1, 3)

    def _context_parallel_attention(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None
    ) -> Tensor:
        """Attend with each of this rank's two chunks to all keys up to the end of the chunk."""
        from megatron.core.parallel_state import get_context_parallel_group
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        layout = self.layout
        chunk_length = query.shape[0] // 2

        # Keys and values travel in one collective, then are put in sequence order.
        gathered = gather_from_sequence_parallel_region(
            torch.cat((key, value), -1), group=get_context_parallel_group()
        )
        keys, values = gathered[layout.gather_order(len(gathered), gathered.device)].chunk(2, -1)

        out = []
        for q, chunk_index in zip(query.split(chunk_length), layout.chunk_indices(), strict=True):
            end = (chunk_index + 1) * chunk_length
            chunk_bounds = None if bounds is None else truncate_bounds(bounds, end)
            out.append(self._attend(q, keys[:end], values[:end], chunk_bounds))
        return torch.cat(out)
