"""Block-causal attention as a Megatron core attention.

Legend: S tokens, B batch, H heads, G key-value heads, D width of a head.
"""

from typing import Any

from torch import Tensor, nn

from bitlm_dist.kernels import block_causal_attention


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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> Tensor:
        """query [S, B, H, D], key and value [S, B, G, D] -> [S, B, H·D]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = block_causal_attention(q, k, v, block=self.block, document_ids=attention_mask, scale=self.scale, backend=self.backend)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
