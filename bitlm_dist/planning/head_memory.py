"""Bytes of the loss of a microbatch: what the head saves for its backward pass, and what it needs
for a moment. The tables list elements per token; the code that they follow is in model/heads/.

Legend: W hidden size of the head, D hidden size of the backbone.
"""

from dataclasses import dataclass

from bitlm_dist.config import Config
from bitlm_dist.model.heads.build import meta_head
from bitlm_dist.model.heads.config import PaperHeadConfig
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.planning.rank_parameters import RankParameters
from bitlm_dist.planning.state_memory import FP32_BYTES, num_elements, split_head
from bitlm_dist.planning.step_sizes import StepSizes
from bitlm_dist.training.partitioners.deepspeed import MAX_BUCKET_NUMEL

# What a layer saves, in multiples of W.
LAYER_TENSORS = {
    "input, modulated twice": 3,
    "queries, keys, values": 3,
    "attention, its projection": 2,
    "gate and up": 3,
    "SwiGLU": 1.5,
    "projection": 1,
}
# Besides the layers, each pass saves these, in multiples of W.
PASS_TENSORS = {
    "input": 1,
    "adaLN's input": 1,
    "final modulation": 2,
    "final norm": 1,
}
MODULATIONS = 6  # times W, for each of the layers that make them
TIME_EMBEDDING = 2  # times W, for each noise sample

# Gradients of a layer in its backward pass, beyond the saved tensors that it frees; times W.
LAYER_BACKWARD = 2

# A mixture's loss computes its derivative by the logits from this many fp32 tensors of their size,
# in slices of so many logits.
LOSS_TENSORS = 3
MAX_SLICE_LOGITS = 2**27

# Rows sorted by pattern are padded to full tiles: on average so many rows per pattern.
PADDING_ROWS = 31


@dataclass(frozen=True)
class HeadBytes:
    """Bytes of the loss of a microbatch.

    Attributes:
        saved: for the backward pass.
        forward: besides these at the end of the forward pass.
        backward: besides these when the backward pass comes to the layers.
    """

    saved: float
    forward: float
    backward: float


def head_bytes(config: Config, parameters: RankParameters, sizes: StepSizes) -> HeadBytes:
    """The head's tensors, or those of the softmax."""
    if config.model.output == "softmax":
        return _softmax_bytes(config, parameters, sizes)

    head = config.head
    width = head.hidden_size
    tokens = sizes.head_tokens
    num_samples = config.diffusion.num_noise_samples
    terms = config.diffusion.loss_weights(meta_head(config, parameters.num_bits).loss_terms)
    num_passes = num_samples + ("autoregressive" in terms)

    per_pass = (
        head.num_layers * sum(LAYER_TENSORS.values())
        + head.num_adaln_layers * MODULATIONS
        + sum(PASS_TENSORS.values())
    )
    # The states of the blocks before, and their projections, serve all passes.
    saved = width * (num_passes * per_pass + num_samples * TIME_EMBEDDING + 2)
    saved += 2 * config.model.backbone.hidden_size
    mixture = (
        0.0 if isinstance(head, PaperHeadConfig) else _mixture_numel(config, parameters, sizes)
    )

    return HeadBytes(
        saved=(saved + mixture) * tokens * sizes.width,
        forward=_loss_bytes(config, parameters, sizes, len(terms)),
        backward=LAYER_BACKWARD * num_samples * width * tokens * sizes.width,
    )


def _mixture_numel(config: Config, parameters: RankParameters, sizes: StepSizes) -> float:
    """Elements per token that the output of the default's head saves."""
    assert not isinstance(config.head, PaperHeadConfig)
    output = meta_head(config, parameters.num_bits).output
    state = config.model.backbone.hidden_size
    num_patterns = 2**config.head.bits_per_group
    num_tables = output.num_posterior_features // num_patterns - 1

    # States that look ahead, to a block and to a token, and the input of the tables.
    saved = 4.0 * state
    saved += 3 * num_tables * state * (1 + PADDING_ROWS * num_patterns / sizes.head_tokens)
    # Logits of the context and of the next token.
    return saved + 2 * output.num_logits


def _loss_bytes(
    config: Config, parameters: RankParameters, sizes: StepSizes, num_terms: int
) -> float:
    """Derivatives of all losses by their logits, in fp32, and the computation of the last one."""
    if isinstance(config.head, PaperHeadConfig):
        return 0.0

    num_logits = meta_head(config, parameters.num_bits).output.num_logits
    logits = sizes.head_tokens * num_logits
    # A teacher's samples are targets of all terms but the first.
    distillation = config.distillation
    num_targets = 1 + (distillation.num_samples if distillation.teacher is not None else 0)
    num_losses = config.diffusion.num_noise_samples + (num_terms - 1) * num_targets
    in_slice = min(logits * num_targets, MAX_SLICE_LOGITS)
    return FP32_BYTES * (num_losses * logits + LOSS_TENSORS * in_slice)


def _softmax_bytes(config: Config, parameters: RankParameters, sizes: StepSizes) -> HeadBytes:
    """Logits, their logarithms and gradients for the rank's part of the vocabulary."""
    rows = next(shape for name, shape in parameters.shapes.items() if name.endswith(".rows"))[0]
    is_split = rows < parameters.vocab_size
    bytes_per_logit = sizes.width + FP32_BYTES if is_split else 3 * FP32_BYTES
    states = 2 * config.model.backbone.hidden_size * sizes.width * sizes.tokens
    return HeadBytes(states, rows * sizes.tokens * bytes_per_logit, 0.0)


def head_engine_bytes(
    config: Config, layout: ParallelLayout, parameters: RankParameters, sizes: StepSizes
) -> float:
    """What the engine that shards the head allocates in a step: buckets, gathered weights."""
    _, shapes = split_head(config, layout, parameters.shapes)
    size = num_elements(shapes)
    if not size:
        return 0.0

    head = config.parallel.head
    shard = FP32_BYTES * size * layout.num_head_instances / len(layout.head_ranks())
    bucket = min(size, MAX_BUCKET_NUMEL)
    if head.engine == "fsdp2":
        return sizes.width * size + shard
    if head.zero_stage == 3:
        return FP32_BYTES * bucket + sizes.width * size
    if head.zero_stage == 0:
        return FP32_BYTES * size

    # Two buckets of gradients, one of which is reduced while the other is filled.
    gradients = sizes.width * size if head.zero_stage == 1 else shard
    if head.offload != "none":
        gradients = 0  # they go to the host
    return 2 * sizes.width * bucket + gradients
