"""Config keys of the parallel layout, and their rules."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from bitlm_dist.config_section import Resume, Section, Trained
from bitlm_dist.model.config import ModelConfig
from bitlm_dist.registry import HEAD_PARTITIONERS

RecomputedStep = Literal["layernorm", "qk_layernorm", "mlp_act", "mlp"]


class HeadParallelConfig(Section):
    """Sharding of the head over the ranks of the last pipeline stage."""

    marks = (Resume.FREE, Trained.FREE)

    engine: Literal[(*HEAD_PARTITIONERS, "replicated")] = "deepspeed"  # type: ignore[valid-type]
    """deepspeed is DeepSpeed's ZeRO, fsdp2 is torch's FSDP2, replicated is no sharding."""
    zero_stage: int = Field(2, ge=0, le=3)
    """ZeRO stage: shard nothing (0), optimizer state (1), gradients too (2), weights too (3).

    FSDP2 supports 2 and 3.
    """
    offload: Literal["none", "optimizer", "all"] = "none"
    """deepspeed: keep the optimizer state, or all (weights too), in host memory.

    optimizer needs stage 1, 2 or 3; all needs stage 3.
    """

    shard_ranks: int | None = Field(None, ge=1)
    """fsdp2: ranks over which the head is sharded; the other ranks hold further copies.

    null: all ranks of the last pipeline stage.
    """

    def problems(self, precision: str) -> Iterator[str]:
        """Settings that the engine does not support."""
        stage = f"parallel.head.zero_stage = {self.zero_stage}"

        # FSDP2 always shards the gradients.
        if self.engine == "fsdp2" and self.zero_stage < 2:
            yield (
                f"{stage}: parallel.head.engine = fsdp2 has stages 2 and 3 only; or use deepspeed"
            )
        if self.engine == "deepspeed" and self.zero_stage < 2 and precision != "fp32":
            yield (
                f"{stage} would add up gradients of bf16 weights in bf16: "
                f"use 2 or 3 with training.precision = {precision}"
            )

        # DeepSpeed reduces gradients over the ranks that share the optimizer state, and no others.
        if self.shard_ranks is not None and self.engine != "fsdp2":
            yield (
                f"parallel.head.shard_ranks = {self.shard_ranks} needs "
                "parallel.head.engine = fsdp2: other engines have no copies of a sharded head"
            )

        # Only what is sharded can be offloaded.
        offload = f"parallel.head.offload = {self.offload}"
        if self.offload != "none" and self.engine != "deepspeed":
            yield f"{offload} needs parallel.head.engine = deepspeed"
        least = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < least:
            yield (
                f"{offload} needs parallel.head.zero_stage of at least {least}, "
                f"not {self.zero_stage}"
            )


class ParallelConfig(Section):
    """Parallel layout."""

    marks = (Resume.FREE, Trained.FREE)

    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks."""
    sequence: bool = False
    """Also split the activations between layers over the tensor-parallel ranks."""
    pipeline: int = Field(1, ge=1)
    """Pipeline stages."""
    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks per pipeline rank (interleaved schedule)."""
    layers_per_stage: tuple[int, ...] | None = None
    """Layers of each of the pipeline x virtual_pipeline stages.

    null: balanced so that the last stages hold fewer, to make up for the head.
    """
    context: int = Field(1, ge=1)
    """Context-parallel ranks."""
    data: int | None = Field(None, ge=1)
    """Data-parallel ranks. null: all remaining ranks."""
    micro_batch_size: int = Field(0, ge=0)
    """Sequences per forward pass of a data-parallel rank.

    0: all of its sequences at once, or one with a pipeline.
    """
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass: those of some steps, or of whole layers."""
    recompute_modules: tuple[RecomputedStep, ...] = ("layernorm", "qk_layernorm", "mlp_act")
    """With selective checkpointing: the steps of each layer that are recomputed.

    layernorm is the two norms, qk_layernorm the norm and rotation of queries and keys, mlp_act
    SwiGLU: they cost no matrix product. mlp is SwiGLU and the projection before it. The core
    attention keeps no weights in any case.
    """
    optimizer_shard_ranks: int | None = Field(None, ge=2)
    """Replicas over which the backbone's optimizer is sharded; the others hold further copies.

    A divisor of the number of replicas, which are the data- and context-parallel ranks. null: all
    of them.
    """
    head: HeadParallelConfig = HeadParallelConfig()

    def problems(self, is_optimizer_sharded: bool) -> Iterator[str]:
        """Splits over an axis of one rank, or of what is not split."""
        if self.sequence and self.tensor == 1:
            yield (
                "parallel.sequence = true splits over the tensor ranks: "
                "set parallel.tensor > 1 or leave it off"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            yield (
                f"parallel.virtual_pipeline = {self.virtual_pipeline} needs parallel.pipeline > 1"
            )
        if self.optimizer_shard_ranks is not None and not is_optimizer_sharded:
            yield (
                f"parallel.optimizer_shard_ranks = {self.optimizer_shard_ranks} needs "
                "optimizer.sharded = true"
            )


def layout_problems(
    parallel: ParallelConfig, model: ModelConfig, sequence_length: int
) -> Iterator[str]:
    """Layouts that the model cannot have on any number of ranks."""
    yield from _axis_problems(parallel, model)
    yield from _sequence_split_problems(parallel, model.block_size, sequence_length)
    yield from _stage_problems(parallel, model.backbone.num_layers)


def _axis_problems(parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    """Tensor and pipeline axes that the model cannot be split over."""
    tensor = parallel.tensor
    for key in ("num_heads", "num_kv_heads", "ffn_hidden_size"):
        size = getattr(model.backbone, key)
        if size % tensor:
            fits = ", ".join(str(t) for t in range(1, min(size, 2 * tensor) + 1) if size % t == 0)
            yield (
                f"model.backbone.{key} = {size} cannot be split over "
                f"parallel.tensor = {tensor} ranks: use one of {fits}"
            )

    if model.tie_embeddings and parallel.pipeline > 1:
        yield "model.tie_embeddings = true needs parallel.pipeline = 1: set it false"
    # The softmax's tables are padded to a multiple of 128 rows.
    if model.output == "softmax" and 128 % tensor:
        yield (
            "model.output = softmax splits its tables in 1, 2, 4, … parts, "
            f"not in parallel.tensor = {tensor}"
        )


def _sequence_split_problems(
    parallel: ParallelConfig, block_size: int, length: int
) -> Iterator[str]:
    """Sequences that cannot be split into whole blocks over the ranks."""
    # Context parallelism deals every rank one chunk from either half, to balance causal attention.
    halves = 2 if parallel.context > 1 else 1
    unit = parallel.tensor * parallel.context * block_size * halves
    if length % unit:
        near = max(1, round(length / unit)) * unit
        yield (
            f"data.sequence_length = {length} cannot be split into whole blocks of {block_size} "
            f"over parallel.tensor = {parallel.tensor} x parallel.context = {parallel.context} "
            f"ranks: it must be a multiple of {unit}, e.g. {near}"
        )


def _stage_problems(parallel: ParallelConfig, num_layers: int) -> Iterator[str]:
    """Layers that cannot be split into the pipeline's stages."""
    stages = parallel.pipeline * parallel.virtual_pipeline

    # Every stage holds at least one layer.
    if stages > num_layers:
        yield (
            f"model.backbone.num_layers = {num_layers} is too few for "
            f"parallel.pipeline x virtual_pipeline = {stages} stages"
        )

    if parallel.layers_per_stage is not None:
        given = list(parallel.layers_per_stage)
        if len(given) != stages or sum(given) != num_layers or min(given, default=0) < 1:
            yield (
                f"parallel.layers_per_stage = {given} must name {stages} stages "
                "(pipeline x virtual_pipeline) of a layer or more "
                f"that add up to model.backbone.num_layers = {num_layers}"
            )
