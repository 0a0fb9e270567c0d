"""Names and shapes of the parameters that one rank of a layout holds, without building a model.

They are also those of another layout than the job's, which Megatron could not build here.
"""

from dataclasses import dataclass

import torch

from bitlm_dist.codes import BitCodes, natural_codes, num_bits_needed
from bitlm_dist.config import Config
from bitlm_dist.model.bit_embedding import BitEmbedding
from bitlm_dist.model.build import layers_per_stage
from bitlm_dist.model.config import BackboneConfig
from bitlm_dist.model.heads.build import meta_head
from bitlm_dist.model.initialization import Embedding, shard_dim
from bitlm_dist.model.vocab_parallel_table import VOCAB_DIVISIBLE_BY
from bitlm_dist.parallel.layout import ModelChunk, ParallelLayout, local_model_chunks

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class RankParameters:
    """What a rank holds.

    Attributes:
        chunks: its model chunks.
        shapes: shapes of its parameters by their names in the full model.
        num_bits: bits per token.
        vocab_size: number of tokens.
    """

    chunks: list[ModelChunk]
    shapes: Shapes
    num_bits: int
    vocab_size: int

    @property
    def num_layers(self) -> int:
        """Layers of all its chunks."""
        return sum(len(chunk.layer_range) for chunk in self.chunks)

    @property
    def is_first(self) -> bool:
        """True if it embeds the tokens."""
        return any(chunk.is_first for chunk in self.chunks)

    @property
    def is_last(self) -> bool:
        """True if it computes the loss."""
        return any(chunk.is_last for chunk in self.chunks)


def rank_parameters(config: Config, layout: ParallelLayout, vocab_size: int) -> RankParameters:
    """List the parameters of the layout's rank.

    Args:
        config: a checked config.
        layout: the layout, and the rank in it.
        vocab_size: number of tokens.
    """
    num_bits = config.model.bits or num_bits_needed(vocab_size)
    with torch.device("meta"):
        codes = BitCodes(natural_codes(vocab_size), num_bits)
    chunks = local_model_chunks(layers_per_stage(config, codes), layout)

    full: Shapes = {}
    for chunk in chunks:
        for layer in chunk.layer_range:
            full |= _layer_shapes(config.model.backbone, f"backbone.block.layers.{layer}.")
        if chunk.is_last:
            hidden_size = config.model.backbone.hidden_size
            full["backbone.block.final_layernorm.weight"] = torch.Size([hidden_size])
            full |= _output_shapes(config, num_bits, vocab_size)
        if chunk.is_first:
            full |= _embedding_shapes(config, num_bits, vocab_size)

    # Both ends of a tied table have one name.
    if config.model.tie_embeddings:
        full.pop("output.rows", None)
    shapes = {name: _local_shape(name, shape, layout.tensor) for name, shape in full.items()}
    return RankParameters(chunks, shapes, num_bits, vocab_size)


def _local_shape(name: str, shape: torch.Size, num_ranks: int) -> torch.Size:
    dim = shard_dim(name)
    return torch.Size(
        size // num_ranks if index == dim else size for index, size in enumerate(shape)
    )


def _layer_shapes(b: BackboneConfig, prefix: str) -> Shapes:
    """Parameters of a backbone layer."""
    width = b.hidden_size
    query = b.num_heads * b.head_dim
    key_value = b.num_kv_heads * b.head_dim
    shapes = {
        "input_layernorm.weight": [width],
        "self_attention.linear_proj.weight": [width, query],
        "self_attention.linear_qkv.weight": [query + 2 * key_value, width],
        "self_attention.q_layernorm.weight": [b.head_dim],
        "self_attention.k_layernorm.weight": [b.head_dim],
        "pre_mlp_layernorm.weight": [width],
        "mlp.linear_fc1.weight": [2 * b.ffn_hidden_size, width],
        "mlp.linear_fc2.weight": [width, b.ffn_hidden_size],
    }
    return {prefix + name: torch.Size(shape) for name, shape in shapes.items()}


def _table_shape(config: Config, vocab_size: int) -> torch.Size:
    num_rows = -(-vocab_size // VOCAB_DIVISIBLE_BY) * VOCAB_DIVISIBLE_BY
    return torch.Size([num_rows, config.model.backbone.hidden_size])


def _embedding_shapes(config: Config, num_bits: int, vocab_size: int) -> Shapes:
    """Parameters of the input, on the first stage."""
    model = config.model
    if model.output == "softmax":
        return {"embedding.rows": _table_shape(config, vocab_size)}

    width = model.backbone.hidden_size
    with torch.device("meta"):
        module = (
            Embedding(vocab_size, width)
            if model.input == "table"
            else BitEmbedding(num_bits, width, model.input_window)
        )
    return {f"embedding.{name}": p.shape for name, p in module.named_parameters()}


def _output_shapes(config: Config, num_bits: int, vocab_size: int) -> Shapes:
    """Parameters of the head or of the softmax, on the last stage."""
    if config.model.output == "softmax":
        return {"output.rows": _table_shape(config, vocab_size)}
    return {f"head.{n}": p.shape for n, p in meta_head(config, num_bits).named_parameters()}
