"""Parallel layout: coordinates of ranks, layers of stages, positions of context-parallel ranks.

Pure arithmetic, without communication. As in Megatron, the tensor-parallel rank varies fastest,
then context, data and pipeline.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.parallel.config import ParallelConfig


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel axes, and the rank of this process."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    data: int = 1
    rank: int = 0
    num_optimizer_instances: int = 1  # groups of replicas, of which each has the full optimizer
    num_head_instances: int = 1  # groups of the last stage's ranks, of which each has the full head

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def tensor_rank(self) -> int:
        """Rank within the tensor-parallel group."""
        return self.rank % self.tensor

    @property
    def context_rank(self) -> int:
        """Rank within the context-parallel group."""
        return self.rank // self.tensor % self.context

    @property
    def data_rank(self) -> int:
        """Rank within the data-parallel group."""
        return self.rank // (self.tensor * self.context) % self.data

    @property
    def pipeline_rank(self) -> int:
        """Rank within the pipeline-parallel group."""
        return self.rank // (self.tensor * self.context * self.data)

    @property
    def model_parallel_size(self) -> int:
        """Number of ranks that hold one replica of the model."""
        return self.tensor * self.context * self.pipeline

    @property
    def num_replicas(self) -> int:
        """Number of data- and context-parallel ranks, which hold the same weights."""
        return self.data * self.context

    @property
    def replica_rank(self) -> int:
        """Rank among those that hold the same weights."""
        return self.rank // self.tensor % self.num_replicas

    @property
    def num_optimizer_shards(self) -> int:
        """Number of replicas over which the optimizer is sharded."""
        return self.num_replicas // self.num_optimizer_instances

    @property
    def optimizer_shard_rank(self) -> int:
        """Rank among the replicas of this optimizer instance."""
        return self.replica_rank % self.num_optimizer_shards

    @property
    def is_first_instance(self) -> bool:
        """True if this rank belongs to the first instance of the optimizer."""
        return self.replica_rank < self.num_optimizer_shards

    def head_ranks(self) -> list[int]:
        """The ranks of the last pipeline stage, in all other groups."""
        return list(range(self.world_size - self.world_size // self.pipeline, self.world_size))

    def chunk_indices(self, rank: int | None = None) -> list[int]:
        """Chunks of a sequence, of 2·context, that a context-parallel rank holds.

        Rank r holds chunks r and 2·context - 1 - r, so that causal attention costs all ranks the
        same.

        Args:
            rank: the context-parallel rank; default: this one.
        """
        rank = self.context_rank if rank is None else rank
        return [0] if self.context == 1 else [rank, 2 * self.context - 1 - rank]

    def local_positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """Positions that this context-parallel rank holds, int64 [length / context].

        The tensor is cached and must not be modified.
        """
        return _local_positions(self.context, self.context_rank, length, device)

    def gather_order(self, length: int, device: torch.device | None = None) -> Tensor:
        """Index of each position in the concatenation over context-parallel ranks, int64 [length].

        The tensor is cached and must not be modified.
        """
        return _gather_order(self.context, length, device)

    def local_head_positions(self, positions: Tensor) -> Tensor:
        """The part of ``positions`` whose blocks the head of this tensor-parallel rank computes."""
        return positions.chunk(self.tensor)[self.tensor_rank]


# Cached, as every layer needs these in every pass; building them blocks on a copy from the host.
@lru_cache(maxsize=16)
def _local_positions(context: int, rank: int, length: int, device: torch.device | None) -> Tensor:
    # an evaluation may build the tensor, but training uses it too
    with torch.inference_mode(False):
        return _positions_of_chunks(
            context, length, ParallelLayout(context=context).chunk_indices(rank)
        ).to(device)


@lru_cache(maxsize=16)
def _gather_order(context: int, length: int, device: torch.device | None) -> Tensor:
    order = [
        chunk
        for rank in range(context)
        for chunk in ParallelLayout(context=context).chunk_indices(rank)
    ]

    with torch.inference_mode(False):
        return _positions_of_chunks(context, length, order).argsort().to(device)


def _positions_of_chunks(context: int, length: int, chunk_indices: list[int]) -> Tensor:
    num_chunks = 1 if context == 1 else 2 * context
    return torch.arange(length).view(num_chunks, -1)[chunk_indices].flatten()


SINGLE_PROCESS = ParallelLayout()


def build_layout(parallel: ParallelConfig, world_size: int, rank: int) -> ParallelLayout:
    """Build the layout of a job.

    Args:
        parallel: sizes of the axes; the data-parallel size may be left open.
        world_size: number of ranks of the job.
        rank: rank of this process.

    Raises:
        UserError: the sizes do not fit ``world_size``; names the keys and what would fit.
    """
    _check_world_size(parallel, world_size)
    layout = ParallelLayout(
        parallel.tensor,
        parallel.sequence,
        parallel.pipeline,
        parallel.virtual_pipeline,
        parallel.context,
        world_size // (parallel.tensor * parallel.context * parallel.pipeline),
        rank,
    )

    num_instances = _num_instances(
        "parallel.optimizer_shard_ranks",
        parallel.optimizer_shard_ranks,
        layout.num_replicas,
        "replicas (data x context ranks)",
    )
    num_head_instances = _num_instances(
        "parallel.head.shard_ranks",
        parallel.head.shard_ranks,
        len(layout.head_ranks()),
        "ranks of the last pipeline stage",
    )
    return replace(
        layout, num_optimizer_instances=num_instances, num_head_instances=num_head_instances
    )


def _check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Check that ``world_size`` ranks can have the axes of ``parallel``.

    Raises:
        UserError: they cannot.
    """
    model_parallel_size = parallel.tensor * parallel.context * parallel.pipeline

    if world_size % model_parallel_size or (
        parallel.data and parallel.data * model_parallel_size != world_size
    ):
        axes = (
            f"parallel.tensor = {parallel.tensor} x parallel.context = {parallel.context} "
            f"x parallel.pipeline = {parallel.pipeline}"
        )
        if parallel.data:
            axes = f"{axes} x parallel.data = {parallel.data}"
            valid_world_sizes = [parallel.data * model_parallel_size]
        else:
            # the nearest multiples below and above
            valid_world_sizes = sorted(
                {
                    max(1, world_size // model_parallel_size) * model_parallel_size,
                    -(-world_size // model_parallel_size) * model_parallel_size,
                }
            )

        started = "1 process was" if world_size == 1 else f"{world_size} processes were"
        need = (
            f"needs {valid_world_sizes[0]}"
            if parallel.data
            else f"needs a multiple of {model_parallel_size}"
        )
        raise UserError(
            f"{started} started, and {axes} {need}: "
            f"start {' or '.join(map(str, valid_world_sizes))}, or change a key"
        )


def _num_instances(key: str, shard_ranks: int | None, num_ranks: int, ranks: str) -> int:
    """Number of groups of ``shard_ranks``; fewer ranks than that are one group.

    Raises:
        UserError: the groups would not be equal.
    """
    size = min(shard_ranks or num_ranks, num_ranks)
    if num_ranks % size:
        fits = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
        nearest = min(fits, key=lambda n: abs(n - size))
        raise UserError(f"{key} = {size} does not divide the {num_ranks} {ranks}: try {nearest}")
    return num_ranks // size


@dataclass(frozen=True)
class ModelChunk:
    """A rank's chunk of the model: layers and, at the ends of the model, embedding and head."""

    layer_range: range
    is_first: bool = True
    is_last: bool = True
    vp_stage: int = 0  # index among the chunks of the rank


def local_model_chunks(layers_per_stage: list[int], layout: ParallelLayout) -> list[ModelChunk]:
    """The chunks of this rank; stage v·pipeline + p is chunk v of pipeline rank p."""
    ends = [sum(layers_per_stage[: i + 1]) for i in range(len(layers_per_stage))]

    chunks = []
    for vp_stage in range(layout.virtual_pipeline):
        stage_index = vp_stage * layout.pipeline + layout.pipeline_rank
        layers = range(ends[stage_index] - layers_per_stage[stage_index], ends[stage_index])
        chunks.append(ModelChunk(layers, stage_index == 0, stage_index == len(ends) - 1, vp_stage))

    return chunks


def split_layers(num_layers: int, num_stages: int, last_stage_extra_layers: float) -> list[int]:
    """Split layers over pipeline stages so that the slowest stage is as fast as possible.

    Args:
        num_layers: layers of the model.
        num_stages: pipeline stages, of which each gets at least one layer.
        last_stage_extra_layers: work of the last stage's head, in layers.

    Returns:
        Layers per stage.
    """
    counts = [1] * num_stages

    # greedy: each layer goes to the stage with the least work
    for _ in range(num_layers - num_stages):
        cost = [
            count + (last_stage_extra_layers if i == num_stages - 1 else 0)
            for i, count in enumerate(counts)
        ]
        counts[cost.index(min(cost))] += 1

    return counts


def resolve_micro_batch_size(config: Config, layout: ParallelLayout) -> int:
    """Sequences per microbatch, i.e. per forward pass, of a data-parallel rank.

    Raises:
        UserError: the global batch cannot be split evenly; names the keys and what would fit.
    """
    num_sequences = config.training.global_batch_tokens // config.data.sequence_length

    num_local_sequences, remainder = divmod(num_sequences, layout.data)
    if remainder or num_local_sequences == 0:
        nearest = (
            max(1, round(num_sequences / layout.data)) * layout.data * config.data.sequence_length
        )
        raise UserError(
            f"training.global_batch_tokens = {config.training.global_batch_tokens} is "
            f"{num_sequences} sequences, which {layout.data} data-parallel ranks cannot share: "
            f"try {nearest}"
        )

    # a pipeline needs many microbatches to fill its stages; otherwise one has all sequences
    micro_batch_size = config.parallel.micro_batch_size or (
        1 if layout.pipeline > 1 else num_local_sequences
    )
    if num_local_sequences % micro_batch_size:
        divisors = [
            size for size in range(1, num_local_sequences + 1) if num_local_sequences % size == 0
        ]
        nearest = min(divisors, key=lambda size: abs(size - micro_batch_size))
        raise UserError(
            f"parallel.micro_batch_size = {micro_batch_size} does not divide the "
            f"{num_local_sequences} sequences per step of a data-parallel rank: try {nearest}"
        )

    if layout.virtual_pipeline > 1 and num_local_sequences // micro_batch_size % layout.pipeline:
        raise UserError(
            "the interleaved schedule (parallel.virtual_pipeline > 1) needs a multiple of "
            f"parallel.pipeline = {layout.pipeline} microbatches per step, not "
            f"{num_local_sequences // micro_batch_size}: "
            "change training.global_batch_tokens or parallel.micro_batch_size"
        )

    return micro_batch_size
