"""Attention kernels of BitLM, and matrix products of unusual shapes.

Two attentions: block-causal over the sequence, and full within each block of m tokens.
"""

from bitlm_dist.kernels.attention import (
    available_backends,
    block_causal_attention,
    decode_attention,
)
from bitlm_dist.kernels.attention_inputs import bounds_of_documents
from bitlm_dist.kernels.grouped_gemm import grouped_matmul
from bitlm_dist.kernels.in_block import in_block_attention

__all__ = [
    "available_backends",
    "block_causal_attention",
    "bounds_of_documents",
    "decode_attention",
    "grouped_matmul",
    "in_block_attention",
]
