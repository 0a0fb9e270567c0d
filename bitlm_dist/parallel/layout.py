"""Who computes what: ranks and their coordinates, layers and their stages, tokens and their ranks; arithmetic alone.

Megatron orders ranks tensor first, then context, data and pipeline.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from bitlm_dist.config import Config, ParallelConfig
from bitlm_dist.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes and the place of this process among them."""

    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    data: int = 1
    rank: int = 0

    @property
    def world(self) -> int:
        """Processes of the job."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def tensor_rank(self) -> int:
        """Place among the tensor-parallel ranks."""
        return self.rank % self.tensor

    @property
    def context_rank(self) -> int:
        """Place among the context-parallel ranks."""
        return self.rank // self.tensor % self.context

    @property
    def data_rank(self) -> int:
        """Place among the data-parallel ranks."""
        return self.rank // (self.tensor * self.context) % self.data

    @property
    def pipeline_rank(self) -> int:
        """Stage."""
        return self.rank // (self.tensor * self.context * self.data)

    @property
    def model(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.context * self.pipeline

    @property
    def replicas(self) -> int:
        """Processes that hold the same weights: data- and context-parallel ranks."""
        return self.data * self.context

    @property
    def replica_rank(self) -> int:
        """Place among them."""
        return self.rank // self.tensor % self.replicas

    def head_ranks(self) -> list[int]:
        """The processes of the last stage: tensor-, context- and data-parallel ones."""
        return list(range(self.world - self.world // self.pipeline, self.world))

    def pieces(self, rank: int | None = None) -> list[int]:
        """The pieces of a sequence that a context rank (default: this one) holds, of 2·context.

        Rank r has the r-th and the r-th last: causal attention costs every rank the same.
        """
        rank = self.context_rank if rank is None else rank
        return [0] if self.context == 1 else [rank, 2 * self.context - 1 - rank]

    def positions(self, length: int, device: torch.device | None = None) -> Tensor:
        """Positions of a sequence that this context rank holds, int64 [length / context]; not to be changed."""
        return _positions(self.context, self.context_rank, length, device)

    def places(self, length: int, device: torch.device | None = None) -> Tensor:
        """Where each position is found when the shares of all context ranks lie one after the other, int64 [length]."""
        return _places(self.context, length, device)

    def own(self, positions: Tensor) -> Tensor:
        """Those of ``positions`` whose blocks the head of this tensor rank handles."""
        return positions.chunk(self.tensor)[self.tensor_rank]


# Every layer asks for these in every pass. Made anew, they would be copied from the host each time, and the host would wait.
@lru_cache(maxsize=16)
def _positions(context: int, rank: int, length: int, device: torch.device | None) -> Tensor:
    with torch.inference_mode(False):  # a training step after an evaluation uses them too
        return _of_pieces(context, length, Layout(context=context).pieces(rank)).to(device)


@lru_cache(maxsize=16)
def _places(context: int, length: int, device: torch.device | None) -> Tensor:
    order = [piece for rank in range(context) for piece in Layout(context=context).pieces(rank)]
    with torch.inference_mode(False):
        return _of_pieces(context, length, order).argsort().to(device)


def _of_pieces(context: int, length: int, pieces: list[int]) -> Tensor:
    count = 1 if context == 1 else 2 * context
    return torch.arange(length).view(count, -1)[pieces].flatten()


ALONE = Layout()


def layout_of(parallel: ParallelConfig, world: int, rank: int) -> Layout:
    """The layout of a job of ``world`` processes.

    Raises:
        UserError: the sizes do not fit the number of processes; names the keys and what would fit.
    """
    model = parallel.tensor * parallel.context * parallel.pipeline
    if world % model or (parallel.data and parallel.data * model != world):
        axes = (
            f"parallel.tensor = {parallel.tensor} x parallel.context = {parallel.context} x parallel.pipeline = {parallel.pipeline}"
        )
        if parallel.data:
            axes, near = f"{axes} x parallel.data = {parallel.data}", [parallel.data * model]
        else:
            near = sorted({max(1, world // model) * model, -(-world // model) * model})
        started = "1 process was" if world == 1 else f"{world} processes were"
        need = f"needs {near[0]}" if parallel.data else f"needs a multiple of {model}"
        raise UserError(f"{started} started, and {axes} {need}: start {' or '.join(map(str, near))}, or change a key")
    return Layout(
        parallel.tensor,
        parallel.sequence,
        parallel.pipeline,
        parallel.virtual_pipeline,
        parallel.context,
        world // model,
        rank,
    )


@dataclass(frozen=True)
class Stage:
    """The part of the model that one process holds in one chunk: layers first..last-1, and what stands at the model's ends."""

    layers: range
    embeds: bool = True
    predicts: bool = True
    chunk: int = 0  # among those of the process


def stages_of(layers_per_stage: list[int], layout: Layout) -> list[Stage]:
    """The chunks of this process; stage v·pipeline + p is chunk v of pipeline rank p."""
    ends = [sum(layers_per_stage[: i + 1]) for i in range(len(layers_per_stage))]
    chunks = []
    for chunk in range(layout.virtual):
        number = chunk * layout.pipeline + layout.pipeline_rank
        layers = range(ends[number] - layers_per_stage[number], ends[number])
        chunks.append(Stage(layers, number == 0, number == len(ends) - 1, chunk))
    return chunks


def split_layers(layers: int, stages: int, last_weighs: float) -> list[int]:
    """Layers of each stage so that the slowest is as fast as can be; the last also does the work of ``last_weighs`` layers."""
    counts = [1] * stages
    for _ in range(layers - stages):
        cost = [count + (last_weighs if i == stages - 1 else 0) for i, count in enumerate(counts)]
        counts[cost.index(min(cost))] += 1
    return counts


def check_batch(config: Config, layout: Layout) -> int:
    """Sequences a forward pass (the microbatch) of the global batch on this layout.

    Raises:
        UserError: the batch cannot be split evenly; names the keys and what would fit.
    """
    sequences = config.training.global_batch_tokens // config.data.sequence_length
    share, rest = divmod(sequences, layout.data)
    if rest or share == 0:
        near = max(1, round(sequences / layout.data)) * layout.data * config.data.sequence_length
        raise UserError(
            f"training.global_batch_tokens = {config.training.global_batch_tokens} is {sequences} sequences, which "
            f"{layout.data} data-parallel ranks cannot share: try {near}"
        )
    microbatch = config.parallel.microbatch or (1 if layout.pipeline > 1 else share)
    if share % microbatch:
        fits = [size for size in range(1, share + 1) if share % size == 0]
        near = min(fits, key=lambda size: abs(size - microbatch))
        raise UserError(f"parallel.microbatch = {microbatch} does not divide a rank's {share} sequences a step: try {near}")
    if layout.virtual > 1 and share // microbatch % layout.pipeline:
        raise UserError(
            f"the interleaved schedule (parallel.virtual_pipeline > 1) needs a multiple of parallel.pipeline = {layout.pipeline} "
            f"microbatches a step, not {share // microbatch}: change training.global_batch_tokens or parallel.microbatch"
        )
    return microbatch
