"""One optimizer step: all microbatches through Megatron's pipeline schedule, then the update."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitlm_dist.codes import BitCodes
from bitlm_dist.compilation import enable_compiled_regions, should_compile
from bitlm_dist.config import Config
from bitlm_dist.data_prep.token_bytes import ByteLengths
from bitlm_dist.model.batch import Batch, TargetFinder, loss_mask
from bitlm_dist.model.build import build_model_chunks
from bitlm_dist.model.initialization import global_named_parameters, shard_dim
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.model.loss_terms import num_packed
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout, resolve_micro_batch_size
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.training.optimizer import Optimizer, lr_multiplier_at
from bitlm_dist.training.partitioners.base import HeadPartitioner, Partitioner
from bitlm_dist.training.partitioners.megatron import MegatronPartitioner
from bitlm_dist.training.partitioners.replicated import ReplicatedPartitioner
from bitlm_dist.training.sharded_head import build_sharded_head, is_head_sharded, with_full_head
from bitlm_dist.training.weights import model_state_dict

# parameters of the head; a tensor-parallel rank computes their gradients from its own blocks only
HEAD_PREFIX = "head."


@dataclass(frozen=True)
class StepResult:
    """Loss, gradient norm and token counts of one optimizer step.

    The tensors are on the device, so the host does not wait for the step. The trainer reads all of
    them one step later.
    """

    loss: Tensor  # [], mean over the predicted tokens of the global batch
    loss_terms: Tensor  # sums over the global batch, see pack_terms; empty for a softmax
    grad_norm: Tensor  # fp64 [], before clipping
    lr_multiplier: float  # learning rates as a fraction of their peaks
    applied: Tensor  # bool [], False if the update was skipped, as the norm was not finite

    # [2] int64: predicted tokens of the global batch, and the UTF-8 bytes of their text
    num_tokens_and_bytes: Tensor


class Engine:
    """The pipeline stages of this rank, wrapped for data parallelism, and their optimizer.

    Args:
        config: a validated config.
        codes: see :func:`~bitlm_dist.model.build.build_model`.
        eos: see :func:`~bitlm_dist.model.build.build_model`.
        layout: the parallel layout of the job.
        byte_lengths: UTF-8 bytes of every token id, to count the bytes of a batch. None: do not
            count them and report 0.
        bos: id of the token that opens a document, used only to count bytes.
        initialize: draw the initial weights. False leaves them unset, as a checkpoint follows.
    """

    def __init__(
        self,
        config: Config,
        codes: BitCodes,
        eos: int,
        layout: ParallelLayout,
        byte_lengths: ByteLengths | None = None,
        bos: int = 0,
        initialize: bool = True,
    ) -> None:
        mesh.init_process_groups(layout)
        self.config = config
        self.layout = layout
        self.micro_batch_size = resolve_micro_batch_size(config, layout)
        self.is_initialized = initialize
        self.chunks = build_model_chunks(config, codes, eos, layout, initialize)

        named = self._global_named_parameters()
        self.num_parameters = self._count_parameters(named)

        # the head's partitioner shards it, so Megatron, which wraps whatever requires a gradient,
        # must not see its parameters
        has_sharded_head = is_head_sharded(config, layout)
        head = [p for n, p in named.items() if has_sharded_head and n.startswith(HEAD_PREFIX)]
        for parameter in head:
            parameter.requires_grad_(False)

        self._ddp_chunks: list[Any]
        partitioners = [
            self._wrap_in_ddp_and_partition({n: p for n, p in named.items() if p.requires_grad})
        ]
        for parameter in head:
            parameter.requires_grad_(True)

        self.sharded_head: HeadPartitioner | None = None
        if has_sharded_head:
            self.sharded_head = build_sharded_head(config, self.chunks[-1], layout)
            partitioners.append(self.sharded_head)
        self.optimizer = Optimizer(config.optimizer, partitioners)

        has_terms = config.model.output == "bits"
        self._num_loss_terms = num_packed(config.model.block_size) if has_terms else 0
        self._bos = bos
        self._byte_lengths = None if byte_lengths is None else _byte_length_table(byte_lengths)
        self._should_compile = should_compile(config.training.compile, mesh.device())
        self._num_microbatches_left = 0  # of this step, not yet announced to the sharded head

        for chunk in self.chunks:
            chunk.backbone.megatron_config.finalize_model_grads_func = self._finalize_grads

    def _global_named_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of this rank, by their names in the full model."""
        return {
            n: p
            for chunk in self.chunks
            for n, p in global_named_parameters(
                chunk, chunk.pipeline_stage.model_chunk.layer_range.start
            )
        }

    def _wrap_in_ddp_and_partition(self, named: dict[str, nn.Parameter]) -> Partitioner:
        """Wrap the chunks in Megatron's DDP, and partition ``named``."""
        # the distributed optimizer shards flat gradient buffers, so tensors may be split
        is_sharded = self.config.optimizer.sharded and self.layout.num_optimizer_shards > 1
        self._ddp_chunks = [
            _wrap_in_ddp(chunk, number == 0, _ddp_config(self.layout, is_sharded))
            for number, chunk in enumerate(self.chunks)
        ]

        if is_sharded:
            return MegatronPartitioner(self._ddp_chunks, named, self.layout)
        return ReplicatedPartitioner(named, self.layout)

    def target_finder(self, max_targets_per_sequence: int | None = None) -> TargetFinder:
        """What finds the blocks and states of this rank that carry loss, before a step.

        Args:
            max_targets_per_sequence: see :class:`TargetFinder`.
        """
        finder = self.chunks[-1].target_finder(self.config.data.sequence_length)
        return replace(
            finder,
            micro_batch_size=self.micro_batch_size,
            max_targets_per_sequence=max_targets_per_sequence,
        )

    @property
    def model(self) -> LanguageModel:
        """The full model, which this rank must hold as one chunk, both first and last."""
        assert len(self.chunks) == 1
        assert self.chunks[0].pipeline_stage.model_chunk.is_first
        assert self.chunks[0].pipeline_stage.model_chunk.is_last
        return self.chunks[0]

    @contextmanager
    def full_model_in_eval_mode(self) -> Iterator[LanguageModel]:
        """Yield the full model in eval mode, gathering the sharded head. Collective."""
        self._finish_weight_sync()
        head = self.sharded_head
        full_head = with_full_head(head, self.config, self.chunks[-1]) if head else nullcontext()
        with full_head:
            try:
                yield self.model.eval()
            finally:
                self.model.train()

    def _finish_weight_sync(self) -> None:
        """Wait until all weights of this rank's chunks are those of the last update. Collective."""
        for partitioner in self.optimizer.partitioners:
            partitioner.finish_weight_sync()

    def model_state_dict(self) -> dict[str, ShardedTensor]:
        """This rank's shards of the weights by checkpoint name, to save or to load into.

        Collective.
        """
        self._finish_weight_sync()
        tensors = model_state_dict(self.chunks)
        if self.sharded_head is not None:
            # the partitioner owns the head's weights; the module's may be empty or sharded
            tensors = {
                n: t for n, t in tensors.items() if not n.startswith(HEAD_PREFIX)
            } | self.sharded_head.model_state_dict()
        return tensors

    def optimizer_state_dict(self) -> dict[str, ShardedTensor]:
        """This rank's shards of the optimizer state, ``NAME.SLOT``, to save or to load into."""
        return self.optimizer.state_dict()

    def load_state_dict(self, optimizer_state_dict: Mapping[str, ShardedTensor]) -> None:
        """Finish loading a checkpoint.

        Call it after the tensors of :meth:`model_state_dict` and :meth:`optimizer_state_dict` were
        loaded in place.
        """
        self.optimizer.load_state_dict(optimizer_state_dict)

    def _count_parameters(self, named: Mapping[str, nn.Parameter]) -> int:
        """Number of parameters of the full model. Collective."""
        layout = self.layout

        # at each pipeline rank, one rank counts its chunks; the all-reduce adds the counts up
        is_counting_rank = layout.tensor_rank == layout.data_rank == layout.context_rank == 0
        num_local = (
            sum(
                p.numel() * (1 if shard_dim(n) is None else layout.tensor) for n, p in named.items()
            )
            if is_counting_rank
            else 0
        )
        return int(mesh.all_reduce_sum(torch.tensor(num_local, device=mesh.device())))

    def train_step(self, batch: Batch, step: int) -> StepResult:
        """Update the model on one global batch. Collective.

        Args:
            batch: the sequences of this data-parallel rank.
            step: index of the step, which selects noise and learning rate.
        """
        with enable_compiled_regions("inductor" if self._should_compile else None):
            loss, loss_terms, num_tokens_and_bytes = self._forward_backward(batch, step)

        lr_multiplier = lr_multiplier_at(self.config.optimizer, step, self.config.training.steps)
        grad_norm, applied = self.optimizer.clip_and_step(lr_multiplier)

        for wrapped in self._ddp_chunks:
            wrapped.zero_grad_buffer()
        return StepResult(loss, loss_terms, grad_norm, lr_multiplier, applied, num_tokens_and_bytes)

    def _count_tokens_and_bytes(self, batch: Batch) -> Tensor:
        """Count the predicted tokens of the global batch and the bytes of their text.

        Returns:
            Both counts, [2]. They stay on the device, so the host does not wait for them.
        """
        model_chunk = self.chunks[0]
        mask = loss_mask(batch, model_chunk.block_size, model_chunk.eos)

        if self._byte_lengths is None:
            text = torch.zeros_like(mask, dtype=torch.int64)
        else:
            # the tokenizer may drop the leading space of a document, which shortens its first token
            first = torch.zeros_like(batch.tokens)
            first[:, 1:] = batch.tokens[:, :-1] == self._bos
            text = self._byte_lengths[first, batch.tokens]

        return mesh.all_reduce_sum_over_data(torch.stack([mask.sum(), (text * mask).sum()]))

    def _forward_backward(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run all microbatches through the pipeline schedule.

        Returns:
            The global batch's loss [], its terms, and :attr:`StepResult.num_tokens_and_bytes`.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        num_tokens_and_bytes = self._count_tokens_and_bytes(batch)
        valid = num_tokens_and_bytes[0].clamp_min(1)

        microbatches = batch.microbatches(self.micro_batch_size)
        self._num_microbatches_left = len(microbatches)

        outputs: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=partial(self._forward_microbatch, valid=valid, step=step),
            data_iterator=[iter(microbatches) for _ in self.chunks],
            model=self._ddp_chunks,
            num_microbatches=len(microbatches),
            seq_length=batch.tokens.shape[1],
            micro_batch_size=self.micro_batch_size,
            forward_only=False,
        )

        # Only ranks of the last stage have outputs. Each loss is divided by the global number of
        # predicted tokens, so their sum is the mean.
        zeros = torch.zeros(1 + self._num_loss_terms, device=mesh.device())
        total = mesh.all_reduce_sum(sum((part["loss and terms"] for part in outputs), zeros))
        return total[0], total[1:], num_tokens_and_bytes

    def _forward_microbatch(
        self, microbatches: Iterator[Batch], wrapped: nn.Module, *, valid: Tensor, step: int
    ) -> tuple[Tensor, Any]:
        """Forward pass of one chunk; the ``forward_step_func`` of Megatron's schedule.

        Returns:
            The chunk's output, and the function that computes the loss from the last chunk's.
        """
        batch = next(microbatches)
        seed = self.config.training.seed
        chunk = wrapped.module
        assert isinstance(chunk, LanguageModel)

        if self.sharded_head is not None and chunk.pipeline_stage.model_chunk.is_last:
            self._num_microbatches_left -= 1
            self.sharded_head.start_microbatch(is_last=self._num_microbatches_left == 0)

        def compute_loss(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            """Loss of the last chunk's output, and its value for the log."""
            # some modules of the head use weights outside of their forward
            self._finish_weight_sync()
            loss, terms = chunk.loss_from_hidden(hidden, batch, seed=seed, step=step)
            loss = loss / valid
            # the schedule changes the loss in place; the count of tokens is not used
            logged = torch.cat((loss.detach().view(1) / chunk.loss_replication, terms))
            return loss, torch.ones((), dtype=torch.int), {"loss and terms": logged}

        return wrapped(batch, seed=seed, step=step), compute_loss

    def _finalize_grads(
        self, wrapped: list[nn.Module], tokens: Tensor | None = None, **settings: Any
    ) -> None:
        """Reduce the gradients once per step, after the last backward pass. Collective.

        Megatron reduces all gradients over data-parallel ranks, and those of norm layers also over
        tensor-parallel ranks. It gets no token count, as the loss is a mean over tokens already.
        """
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads(wrapped, None, **settings)
        if self.layout.tensor == 1:
            return

        # weights that tensor ranks replicate, but whose gradients they compute from different
        # blocks or, under sequence parallelism, from different positions
        partial_names = (
            *(() if self.sharded_head else (HEAD_PREFIX,)),
            *(("embedding.",) if self.layout.sequence else ()),
        )
        mesh.all_reduce_coalesced(
            [
                p.main_grad  # type: ignore[attr-defined]
                for chunk in self.chunks
                for n, p in chunk.named_parameters()
                if n.startswith(partial_names) and shard_dim(n) is None
            ],
            mesh.tensor_group(),
        )


def _byte_length_table(byte_lengths: ByteLengths) -> Tensor:
    """Bytes per token id, [2, V]: row 0 inside a document, row 1 at its first token."""
    return torch.from_numpy(np.stack([byte_lengths.inside, byte_lengths.first])).to(mesh.device())


def _ddp_config(layout: ParallelLayout, is_optimizer_sharded: bool) -> Any:
    """Config of Megatron's data parallelism; communication overlaps with compute on GPUs."""
    from megatron.core.distributed import DistributedDataParallelConfig

    overlaps = mesh.device().type == "cuda"
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=is_optimizer_sharded,
        num_distributed_optimizer_instances=(
            layout.num_optimizer_instances if is_optimizer_sharded else 1
        ),
        overlap_grad_reduce=overlaps,
        overlap_param_gather=overlaps and is_optimizer_sharded,
    )


def _wrap_in_ddp(chunk: LanguageModel, is_first: bool, ddp_config: Any) -> nn.Module:
    from megatron.core.distributed import DistributedDataParallel

    # as in Megatron's training loop: reductions of later chunks overlap with compute anyway
    wrapped: nn.Module = DistributedDataParallel(
        chunk.backbone.megatron_config, ddp_config, chunk, disable_bucketing=not is_first
    )
    return wrapped
