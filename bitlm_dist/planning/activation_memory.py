"""Bytes of the backbone in a step: what its layers save for the backward pass, and what they need
for a moment.

The table lists the tensors that Megatron's layer saves with this project's attention;
`python tests/planning/memory_cases.py` prints the estimate beside traces.

Legend: S tokens on this rank, B sequences per microbatch, D hidden size, F that of the SwiGLU.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from bitlm_dist.config import Config
from bitlm_dist.model.config import BackboneConfig
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.planning.rank_parameters import RankParameters
from bitlm_dist.planning.step_sizes import StepSizes


class Saved(NamedTuple):
    """Elements per token of a saved tensor, and what divides its tokens or features."""

    numel: float
    split: str = ""  # "tensor": over tensor ranks; "sequence": with sequence parallelism; "": whole


def layer_tensors(b: BackboneConfig, context: int) -> dict[str, Saved]:
    """What a backbone layer saves."""
    width = b.hidden_size
    query = b.num_heads * b.head_dim
    key_value = b.num_kv_heads * b.head_dim
    tensors = {
        "first norm": Saved(width, "sequence"),
        "queries, keys, values": Saved(query + 2 * key_value, "tensor"),
        "rotated queries and keys": Saved(query + key_value, "tensor"),
        "attention": Saved(query, "tensor"),
        "output of attention": Saved(width, "sequence"),
        "second norm": Saved(width, "sequence"),
        "gate and up": Saved(2 * b.ffn_hidden_size, "tensor"),
        "their product": Saved(b.ffn_hidden_size, "tensor"),
        "residual after the SwiGLU": Saved(width, "sequence"),
    }
    if context > 1:
        # Keys and values of all context ranks in place of the own keys, and two chunks joined.
        tensors["gathered keys and values"] = Saved(
            query - key_value + 2 * context * key_value, "tensor"
        )
    return tensors


# Gradients of a SwiGLU in its backward pass, beyond the saved tensors that it frees; times F.
SWIGLU_BACKWARD = 2

# Tensors that the steps of `parallel.recompute_modules` do not save; `full` saves the last residual
# alone.
RECOMPUTED = {
    "layernorm": ("first norm", "second norm"),
    "qk_layernorm": ("rotated queries and keys",),
    "mlp_act": ("their product",),
    "mlp": ("gate and up", "their product"),
}
LAST_RESIDUAL = "residual after the SwiGLU"


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


def recomputed_tensors(config: Config, names: Iterable[str]) -> set[str]:
    """Names of the tensors that the backward pass of a layer recomputes."""
    parallel = config.parallel
    if parallel.activation_checkpointing == "full":
        return {*names} - {LAST_RESIDUAL}
    if parallel.activation_checkpointing == "none":
        return set()
    return {name for step in parallel.recompute_modules for name in RECOMPUTED[step]}


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
    recomputed = recomputed_tensors(config, tensors)
    kept = [name for name in tensors if name not in recomputed]

    state = tensors[LAST_RESIDUAL]  # [S, B, D]
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
    recomputed = recomputed_tensors(config, tensors)
    gradient_of_weight = 2 * b.ffn_hidden_size * b.hidden_size * sizes.width / layout.tensor
    return (
        _bytes_of(ffn, sizes, layout)
        + sum(tensors[name] for name in recomputed)
        + gradient_of_weight
    )
