"""One optimizer step through Megatron's schedules: forward and backward over all microbatches and stages, then the update."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitlm_dist.codes import BitCodes
from bitlm_dist.compilation import compiled_regions, compiles
from bitlm_dist.config import Config
from bitlm_dist.data_prep.token_bytes import ByteLengths
from bitlm_dist.model.build import build_chunks
from bitlm_dist.model.initialization import global_names, split_dimension
from bitlm_dist.model.language_model import Batch, LanguageModel, target_mask
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import Layout, check_batch
from bitlm_dist.parallel.sliced import Sliced
from bitlm_dist.training.distributed_adamw import DistributedAdamW
from bitlm_dist.training.optimizer import Optimizers, schedule_factor, step_together
from bitlm_dist.training.sharded_head import ShardedHead, held_back, is_sharded
from bitlm_dist.training.weights import model_tensors

HEAD = "head."  # of these weights every tensor rank sees its own blocks only


@dataclass(frozen=True)
class Update:
    """What one optimizer step saw."""

    loss: Tensor  # mean over the valid tokens
    norm: float  # of the gradient, before clipping
    factor: float  # of the learning rates
    made: bool  # False: the norm was not finite
    counts: Tensor  # [2] int64, of the global batch: predicted tokens (those that carry loss), UTF-8 bytes of their text


class Engine:
    """The stages of this process, wrapped for data parallelism, and their optimizers.

    Args:
        config: checked.
        codes, eos: see :func:`~bitlm_dist.model.build.build_model`.
        layout: of the job.
        byte_lengths: UTF-8 bytes of each token id, by which the text of a batch is counted; None: it is not, its bytes are 0.
        bos: id that opens a document; only to count bytes.
    """

    def __init__(
        self, config: Config, codes: BitCodes, eos: int, layout: Layout, byte_lengths: ByteLengths | None = None, bos: int = 0
    ) -> None:
        mesh.initialize(layout)
        self.config, self.layout = config, layout
        self.microbatch = check_batch(config, layout)
        self.chunks = [chunk.to(mesh.device()) for chunk in build_chunks(config, codes, eos, layout)]
        megatron_shards = config.optimizer.sharded and config.optimizer.matrices == "adamw" and layout.replicas > 1
        named = {n: p for chunk in self.chunks for n, p in global_names(chunk, chunk.place.stage.layers.start)}
        self.parameters = self._count(named)
        apart = is_sharded(config, layout)
        if apart:
            named = {n: p for n, p in named.items() if not n.startswith(HEAD)}
        self.optimizers: Optimizers | DistributedAdamW
        with held_back(self.chunks[-1]) if apart else nullcontext():
            self._wrapped: list[Any] = [_wrap(chunk, number == 0, megatron_shards) for number, chunk in enumerate(self.chunks)]
            if megatron_shards:
                self.optimizers = DistributedAdamW(self._wrapped, named, config.optimizer, layout)
            else:
                self.optimizers = Optimizers(named, config.optimizer, layout)
        self.head = ShardedHead(config, self.chunks[-1], layout) if apart else None
        self._bos = bos
        self._byte_lengths: Tensor | None = None  # [2, V]: of a token that follows another, and of a document's first one
        if byte_lengths is not None:
            self._byte_lengths = torch.from_numpy(np.stack([byte_lengths.inside, byte_lengths.first])).to(mesh.device())
        self._compiles = compiles(config.training.compile, mesh.device())
        self._left = 0  # microbatches of the step that the head has not seen
        for chunk in self.chunks:
            chunk.backbone.megatron_config.finalize_model_grads_func = self._finalize

    @property
    def model(self) -> LanguageModel:
        """The whole model, where one process holds it."""
        assert len(self.chunks) == 1
        assert self.chunks[0].place.stage.embeds
        assert self.chunks[0].place.stage.predicts
        return self.chunks[0]

    @contextmanager
    def evaluating(self) -> Iterator[LanguageModel]:
        """The whole model, ready to be evaluated, where one process holds all but shares of its head; every process calls it."""
        with self.head.whole() if self.head is not None else nullcontext():
            try:
                yield self.model.eval()
            finally:
                self.model.train()

    def weights(self) -> dict[str, Sliced]:
        """What this process holds of the weights, by their names in a checkpoint: to be saved, or to be loaded into."""
        tensors = model_tensors(self.chunks)
        if self.head is not None:
            tensors = {n: t for n, t in tensors.items() if not n.startswith(HEAD)} | self.head.weights()
        return tensors

    def state(self) -> dict[str, Sliced]:
        """What this process holds of the optimizers' state, ``NAME.SLOT``: to be saved, or to be loaded into."""
        return self.optimizers.state() | ({} if self.head is None else self.head.state())

    def restore(self, state: Mapping[str, Sliced]) -> None:
        """Take over what was loaded into the tensors of :meth:`weights` and :meth:`state`."""
        self.optimizers.restore(state)
        if self.head is not None:
            self.head.restore()

    def _count(self, named: Mapping[str, nn.Parameter]) -> int:
        """Parameters of the whole model."""
        layout = self.layout
        first = layout.tensor_rank == layout.data_rank == layout.context_rank == 0
        own = sum(p.numel() * (1 if split_dimension(n) is None else layout.tensor) for n, p in named.items()) if first else 0
        return int(mesh.sum_over_all(torch.tensor(own, device=mesh.device())))

    def step(self, batch: Batch, step: int) -> Update:
        """Update the model on this data rank's share of a global batch, the ``step``-th."""
        with compiled_regions("inductor" if self._compiles else None):
            loss, counts = self._forward_backward(batch, step)
        factor = schedule_factor(self.config.optimizer, step, self.config.training.steps)
        parts = [self.optimizers] if self.head is None else [self.optimizers, self.head]
        norm, made = step_together(parts, self.config.optimizer.clip_norm, factor)
        for wrapped in self._wrapped:
            wrapped.zero_grad_buffer()
        return Update(loss, norm, factor, made, counts)

    def _counts(self, batch: Batch) -> Tensor:
        """Predicted tokens and bytes of their text in the global batch, [2]; the host waits for nothing."""
        one = self.chunks[0]
        mask = target_mask(batch, one.block_size, one.eos)
        if self._byte_lengths is None:
            text = torch.zeros_like(mask, dtype=torch.int64)
        else:
            first = torch.zeros_like(batch.tokens)
            first[:, 1:] = batch.tokens[:, :-1] == self._bos
            text = self._byte_lengths[first, batch.tokens]
        return mesh.sum_over_data(torch.stack([mask.sum(), (text * mask).sum()]))

    def _forward_backward(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Loss [] and :attr:`Update.counts` of the global batch."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        counts = self._counts(batch)
        valid = counts[0].clamp_min(1)
        count = len(batch.tokens) // self.microbatch
        self._left = count
        parts = [batch.part(slice(i * self.microbatch, (i + 1) * self.microbatch)) for i in range(count)]
        found: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=partial(self._forward, valid=valid, step=step),
            data_iterator=[iter(parts) for _ in self.chunks],
            model=self._wrapped,
            num_microbatches=count,
            seq_length=batch.tokens.shape[1],
            micro_batch_size=self.microbatch,
            forward_only=False,
        )
        return mesh.sum_over_all(sum((part["loss"] for part in found), torch.zeros((), device=mesh.device()))), counts

    def _forward(self, parts: Iterator[Batch], wrapped: nn.Module, *, valid: Tensor, step: int) -> tuple[Tensor, Any]:
        batch, seed = next(parts), self.config.training.seed
        chunk = wrapped.module
        assert isinstance(chunk, LanguageModel)
        if self.head is not None and chunk.place.stage.predicts:
            self._left -= 1
            self.head.begin(last=self._left == 0)

        def loss_of(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss = chunk.loss_after(hidden, batch, seed=seed, step=step) / valid
            # the schedule changes the loss in place; the count of tokens is not used
            return loss, torch.ones((), dtype=torch.int), {"loss": loss.detach() / chunk.loss_copies}

        return wrapped(batch, seed=seed, step=step), loss_of

    def _finalize(self, wrapped: list[nn.Module], tokens: Tensor | None = None, **settings: Any) -> None:
        """Megatron's reductions over data and norms, without its division by tokens; then what tensor ranks saw in parts."""
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads(wrapped, None, **settings)
        if self.layout.tensor == 1:
            return
        partial_names = (*(() if self.head else (HEAD,)), *(("embedding.",) if self.layout.sequence else ()))
        for chunk in self.chunks:
            partly = [p for n, p in chunk.named_parameters() if n.startswith(partial_names) and split_dimension(n) is None]
            grads = [p.main_grad for p in partly]  # type: ignore[attr-defined]
            for grad in grads:
                torch.distributed.all_reduce(grad, group=mesh.tensor_group())


def _wrap(chunk: LanguageModel, first: bool, shards: bool) -> nn.Module:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=shards,
        overlap_grad_reduce=mesh.device().type == "cuda",
    )
    wrapped: nn.Module = DistributedDataParallel(chunk.backbone.megatron_config, settings, chunk, disable_bucketing=not first)
    return wrapped
