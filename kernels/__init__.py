"""The two attentions of BitLM: block-causal over the sequence, and full inside each block; and products of unusual shapes."""

from bitlm_dist.kernels.attention import available_backends, block_causal_attention, decode_attention
from bitlm_dist.kernels.call import bounds_of_documents
from bitlm_dist.kernels.grouped import grouped_matmul
from bitlm_dist.kernels.in_block import in_block_attention

__all__ = [
    "available_backends",
    "block_causal_attention",
    "bounds_of_documents",
    "decode_attention",
    "grouped_matmul",
    "in_block_attention",
]
