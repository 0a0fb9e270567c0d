"""Bytes that a step allocates on top of the state: tensors saved for the backward pass, and what
each phase of the step needs for a moment.

The tables below list the tensors by name. They follow the code of Megatron's layer and of the
heads; `python tests/planning/estimates.py` prints what they give beside traces.

Legend: D, F, Q, KV hidden size, SwiGLU, queries, keys (or values) of the backbone; W hidden size of
the head; A noise samples; P passes of the head; R, G, P mixture components, groups, patterns.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from bitlm_dist.config import Config
from bitlm_dist.model.config import BackboneConfig
from bitlm_dist.model.heads.build import meta_head
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.planning.rank_parameters import RankParameters
from bitlm_dist.planning.state_memory import FP32_BYTES, num_elements, split_head, weight_bytes
from bitlm_dist.training.partitioners.deepspeed import MAX_BUCKET_NUMEL

# What the optimizer's update may need besides its state: Muon's full matrices, in bounded rounds.
MUON_BYTES = 4 * 2**30

# Full tiles of the grouped product of a head's tables: rows of padding per pattern, on average.
PADDING_ROWS = 31
MAX_SLICE_LOGITS = 2**27  # of a mixture's loss, which is computed in slices of tokens


class Saved(NamedTuple):
    """Elements per token of a saved tensor, and what divides its tokens or features."""

    numel: float
    split: str = ""  # "tensor": over tensor ranks; "sequence": with sequence parallelism; "": whole


@dataclass(frozen=True)
class StepSizes:
    """Sizes of one microbatch on one rank.

    Attributes:
        tokens: tokens of the backbone's layers, before sequence parallelism.
        head_tokens: tokens whose loss the rank computes.
        num_microbatches: per step.
        width: bytes per element.
    """

    tokens: float
    head_tokens: float
    num_microbatches: int
    width: int

    @classmethod
    def of(cls, config: Config, layout: ParallelLayout, micro_batch_size: int) -> "StepSizes":
        """Sizes for a config and a layout."""
        tokens = micro_batch_size * config.data.sequence_length / layout.context
        # Every tensor rank computes the logits of all tokens for its part of a vocabulary.
        parts = layout.tensor if config.model.output == "bits" else 1
        num_sequences = config.training.global_batch_tokens // config.data.sequence_length
        num_microbatches = max(1, num_sequences // layout.data // micro_batch_size)
        return cls(tokens, tokens / parts, num_microbatches, weight_bytes(config))


# --- backbone -------------------------------------------------------------------------------------


def layer_tensors(b: BackboneConfig, context: int) -> dict[str, Saved]:
    """What a backbone layer saves."""
    width = b.hidden_size
    query = b.num_heads * b.head_dim
    key_value = b.num_kv_heads * b.head_dim
    tensors = {
        "first norm": Saved(width, "sequence"),
        "queries, keys, values": Saved(query + 2 * key_value, "tensor"),
        "cosines and sines": Saved(4 * b.head_dim),
        "rotated queries and keys": Saved(query + key_value, "tensor"),
        "attention, twice": Saved(2 * query, "tensor"),
        "residual after attention": Saved(width, "sequence"),
        "second norm": Saved(width, "sequence"),
        "gate and up": Saved(2 * b.ffn_hidden_size, "tensor"),
        "silu of the gate, up": Saved(2 * b.ffn_hidden_size, "tensor"),
        "their product": Saved(b.ffn_hidden_size, "tensor"),
        "residual after the SwiGLU": Saved(width, "sequence"),
    }
    if context > 1:
        # Keys and values of all context ranks in place of the own keys, and two chunks joined.
        tensors["gathered keys and values"] = Saved(
            query - key_value + 2 * context * key_value, "tensor"
        )
    return tensors


# In the backward pass of a layer: gradients of the SwiGLU, beyond the saved tensors it frees.
SWIGLU_BACKWARD = 5  # times F

# Names of the tensors that activation checkpointing does not save.
RECOMPUTED = {"none": (), "selective": ("attention, twice",)}
KEPT_BY_FULL = "residual after the SwiGLU"


def _bytes_of(saved: Saved, sizes: StepSizes, layout: ParallelLayout) -> float:
    parts = {
        "tensor": layout.tensor,
        "sequence": layout.tensor if layout.sequence else 1,
        "": 1,
    }[saved.split]
    return saved.numel * sizes.tokens * sizes.width / parts


def layer_bytes(config: Config, layout: ParallelLayout, sizes: StepSizes) -> dict[str, float]:
    """Bytes of each tensor of :func:`layer_tensors` on a rank."""
    tensors = layer_tensors(config.model.backbone, layout.context)
    return {name: _bytes_of(saved, sizes, layout) for name, saved in tensors.items()}


def layers_in_flight(
    layout: ParallelLayout, parameters: RankParameters, num_microbatches: int
) -> tuple[int, int]:
    """Layers and first chunks whose activations a rank holds at most, counted per microbatch.

    As in Megatron's schedules: 1F1B, or interleaved if a rank has several chunks.
    """
    stages_after = layout.pipeline - layout.pipeline_rank - 1
    num_chunks = layout.virtual_pipeline
    if num_chunks == 1:
        in_flight = min(stages_after + 1, num_microbatches)
        chunk_order = [0] * in_flight
    else:
        num_warmup = 2 * stages_after + (num_chunks - 1) * layout.pipeline
        in_flight = min(num_warmup + 1, num_chunks * num_microbatches)
        chunk_order = [i // layout.pipeline % num_chunks for i in range(in_flight)]

    chunks = [parameters.chunks[index] for index in chunk_order]
    return sum(len(chunk.layer_range) for chunk in chunks), sum(chunk.is_first for chunk in chunks)


def backbone_bytes(
    config: Config, layout: ParallelLayout, parameters: RankParameters, sizes: StepSizes
) -> Counter[str]:
    """What the layers of all microbatches in flight save, by item."""
    num_layers, num_first = layers_in_flight(layout, parameters, sizes.num_microbatches)
    tensors = layer_bytes(config, layout, sizes)
    policy = config.parallel.activation_checkpointing
    kept = (
        [KEPT_BY_FULL]
        if policy == "full"
        else [name for name in tensors if name not in RECOMPUTED[policy]]
    )

    state = tensors[KEPT_BY_FULL]  # [S, B, D]
    items: Counter[str] = Counter()
    items["activations of the layers"] = round(num_layers * sum(tensors[name] for name in kept))
    # The MLP on the bits saves its two hidden layers, too.
    num_embedded = 3 if config.model.input == "bits" and config.model.output == "bits" else 1
    items["embedding"] = round(num_first * num_embedded * state)
    if parameters.is_last:
        items["final norm"] = round(state)
    items["communication buffers"] = communication_bytes(config, layout, parameters, sizes)
    return items


def communication_bytes(
    config: Config, layout: ParallelLayout, parameters: RankParameters, sizes: StepSizes
) -> int:
    """Buffers that Megatron keeps: gathered states, and states and gradients between stages."""
    full = config.model.backbone.hidden_size * sizes.tokens * sizes.width
    local = full / layout.tensor if layout.sequence else full
    num_received = sum(not chunk.is_first for chunk in parameters.chunks)
    return round((full if layout.sequence else 0) + 2 * num_received * local)


def layer_backward_bytes(config: Config, layout: ParallelLayout, sizes: StepSizes) -> float:
    """What the backward pass of a layer needs for a moment, and what it first recomputes."""
    tensors = layer_bytes(config, layout, sizes)
    b = config.model.backbone
    ffn = Saved(SWIGLU_BACKWARD * b.ffn_hidden_size, "tensor")
    policy = config.parallel.activation_checkpointing
    recomputed = tensors if policy == "full" else RECOMPUTED[policy]
    gradient_of_weight = 2 * b.ffn_hidden_size * b.hidden_size * sizes.width / layout.tensor
    return (
        _bytes_of(ffn, sizes, layout)
        + sum(tensors[name] for name in recomputed)
        + gradient_of_weight
    )


# --- head -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of the loss of a microbatch.

    Attributes:
        saved: for the backward pass.
        forward: at the end of the forward pass, besides.
        backward: at the beginning of the backward pass through the layers, besides.
    """

    saved: float
    forward: float
    backward: float


# Tensors [tokens, W] that a layer of the head saves, and that its backward pass needs for a moment.
HEAD_LAYER = {
    "normed, modulated, residuals": 6,
    "queries, keys, values": 3,
    "attention, its projection": 2,
    "gate and up": 3,
    "silu and product": 3,
    "projection": 1,
}
HEAD_BACKWARD = 10


def head_bytes(config: Config, parameters: RankParameters, sizes: StepSizes) -> HeadBytes:
    """The head's tensors, or those of the softmax."""
    if config.model.output == "softmax":
        return _softmax_bytes(parameters, sizes, config)

    head = config.head
    width = head.hidden_size
    state = config.model.backbone.hidden_size
    tokens = sizes.head_tokens
    num_samples = config.diffusion.num_noise_samples
    is_mixture = head.kind != "paper"
    num_passes = num_samples + is_mixture  # and the autoregressive one

    # Per pass: layers, modulations, final modulation and norm, adaLN's input, the pass's input.
    layers = sum(HEAD_LAYER.values()) * head.num_layers
    per_pass = width * (layers + 6 * head.num_adaln_layers + 2 + 2 + 2)
    # Once, or per noise sample: time embedding, projected states, states of the blocks.
    saved = num_passes * per_pass + num_samples * 2 * width + 2 * width + 2 * state
    forward = 0.0
    if is_mixture:
        extra_saved, forward = _mixture_numel(config, parameters, tokens)
        saved += extra_saved
    return HeadBytes(
        saved=saved * tokens * sizes.width,
        forward=forward * tokens * FP32_BYTES,
        backward=HEAD_BACKWARD * num_samples * width * tokens * sizes.width,
    )


def _mixture_numel(
    config: Config, parameters: RankParameters, tokens: float
) -> tuple[float, float]:
    """Elements per token that a mixture saves, and fp32 elements at the end of its forward pass."""
    output = meta_head(config, parameters.num_bits).output
    state = config.model.backbone.hidden_size
    num_patterns = 2**config.head.bits_per_group
    num_groups = output.num_posterior_features // num_patterns
    num_logits = output.num_logits

    # Rows sorted by pattern for the group tables, padded to whole tiles.
    rows = 1 + PADDING_ROWS * num_patterns / tokens
    saved = 4 * state + 3 * (num_groups - 1) * rows * state
    # Logits of the context and of the next token.
    saved += 2 * num_logits

    # Each loss keeps its derivative by the logits in fp32; the last one computes it from three
    # tensors of that size.
    num_losses = config.diffusion.num_noise_samples + 3
    in_slice = min(1.0, MAX_SLICE_LOGITS / (tokens * num_logits))
    return saved, (num_losses + 4 * in_slice) * num_logits


def _softmax_bytes(parameters: RankParameters, sizes: StepSizes, config: Config) -> HeadBytes:
    """Logits, log-probabilities and gradients of a softmax over the rank's part of the rows."""
    rows = next(s for n, s in parameters.shapes.items() if n.endswith(".rows"))[0]
    is_split = rows < parameters.vocab_size
    bytes_per_logit = sizes.width + FP32_BYTES if is_split else 3 * FP32_BYTES
    state = 2 * config.model.backbone.hidden_size * sizes.width * sizes.tokens
    return HeadBytes(state, rows * sizes.tokens * bytes_per_logit, 0.0)


def head_engine_bytes(
    config: Config, layout: ParallelLayout, parameters: RankParameters, sizes: StepSizes
) -> float:
    """What the engine that shards the head allocates in a step: buckets, gathered weights."""
    _, shapes = split_head(config, layout, parameters.shapes)
    size = num_elements(shapes)
    if not size:
        return 0.0

    head = config.parallel.head
    shard_bytes = FP32_BYTES * size / len(layout.head_ranks())
    bucket = min(size, MAX_BUCKET_NUMEL)
    if head.engine == "fsdp2":
        return sizes.width * size + shard_bytes
    if head.zero_stage == 3:
        return FP32_BYTES * bucket + sizes.width * size
    if head.zero_stage == 0:
        return FP32_BYTES * size

    # Two buckets of gradients, one of which is reduced while the other is filled.
    gradients = sizes.width * size if head.zero_stage == 1 else shard_bytes
    return 2 * sizes.width * bucket + gradients
