"""The head sharded outside Megatron, by the engine that ``parallel.head.engine`` selects."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from bitlm_dist.config import Config
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.build import cast_weights
from bitlm_dist.model.head_loss import HeadBatch, HeadLoss
from bitlm_dist.model.heads.build import build_head
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.partition import Partition
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.parallel.zero_head import ZeroHead, check_deepspeed
from bitlm_dist.training.head_optimizer import HeadOptimizer
from bitlm_dist.training.optimizer import EMA, EMA_SLOT, MASTER_WEIGHT_SLOT, build_param_groups

STEP_SLOT = "step"  # of AdamW's state, one element per partition


class HeadEngine(Protocol):
    """Shards the head over the ranks of the last pipeline stage, and sums their gradients.

    Collective over these ranks: all of them must call its methods in the same order.
    """

    def __call__(self, batch: HeadBatch) -> tuple[Tensor, Tensor]:
        """Run :meth:`HeadLoss.forward` on this rank's blocks.

        The gradients with respect to ``batch.context`` and ``batch.states`` are local and unscaled.
        """
        ...

    def start_microbatch(self, is_last: bool) -> None:
        """Announce the forward and backward pass of a microbatch; ``is_last``: the step's last."""
        ...

    def reduce_grads(self) -> None:
        """Complete the gradients' reduction, after the step's last backward pass."""
        ...

    def grad_norm(self) -> float:
        """Norm of the full gradient."""
        ...

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the partitions, copy them to the model's weights, and drop the gradients."""
        ...

    def partitions(self) -> list[Partition]:
        """The fp32 weights as the optimizer sees them."""
        ...

    def sync_model_weights(self) -> None:
        """Copy the fp32 partitions, which were changed from outside, to the model's weights."""
        ...


def is_head_sharded(config: Config, layout: ParallelLayout) -> bool:
    """True if an engine of its own shards the head."""
    # On a single rank there is nothing to shard, whatever the config says.
    return (
        config.model.output == "bits"
        and config.parallel.head.engine != "replicated"
        and len(layout.head_ranks()) > 1
    )


def check_head_engine(config: Config, layout: ParallelLayout) -> None:
    """Check that the head's engine is installed in a tested version.

    Raises:
        UserError: It is not.
    """
    if is_head_sharded(config, layout) and config.parallel.head.engine == "deepspeed":
        check_deepspeed()


@contextmanager
def excluded_from_ddp(model: LanguageModel) -> Iterator[None]:
    """Context in which Megatron's DDP and optimizers do not see the head's parameters."""
    parameters = model.head_parameters()

    # Megatron wraps whatever requires a gradient.
    for parameter in parameters:
        parameter.requires_grad_(False)

    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class ShardedHead:
    """The sharded head's part of an optimizer step and of a checkpoint.

    An :class:`~bitlm_dist.training.optimizer.OptimizerPart`. Collective: all ranks of the job must
    construct one; on ranks without a head, all methods but :meth:`grad_norm_squared` are no-ops.

    Args:
        config: A checked config.
        model: The last model chunk of this rank.
        layout: The job's parallel layout.
    """

    def __init__(self, config: Config, model: LanguageModel, layout: ParallelLayout) -> None:
        assert isinstance(model, BitLM)
        self._layout = layout
        self._has_stepped = False  # True between step() and zero_grad()
        self.engine: HeadEngine | None = None
        if not model.pipeline_stage.model_chunk.is_last:
            return

        module = HeadLoss(config, model.codes, model.head)
        self._dtype = next(model.head.parameters()).dtype
        named: dict[str, Tensor] = dict(module.named_parameters())

        if config.parallel.head.engine == "fsdp2":
            from bitlm_dist.parallel.fsdp_head import FsdpHead  # imports half a second of torch

            # FSDP2 has its partitions from the start, and the optimizer updates these.
            self.engine = FsdpHead(config, module, list(model.head.blocks))
            named = {
                partition.param_ranges[0].name: partition.flat
                for partition in self.engine.partitions()
            }
            self._optimizer = HeadOptimizer(
                build_param_groups(named, config.optimizer), config.optimizer
            )
        else:
            # DeepSpeed replaces the optimizer's parameters by its own partitions.
            self._optimizer = HeadOptimizer(
                build_param_groups(named, config.optimizer), config.optimizer
            )
            self.engine = ZeroHead(config, module, self._optimizer)

        self._optimizer.partitions = self.engine.partitions
        self._ema = EMA(config.optimizer.ema, self._flat_weights())
        self._config = config
        self._model = model
        model.head_loss = self.engine.__call__

    def _flat_weights(self) -> dict[str, Tensor]:
        """The partitions, each by the name of its first tensor."""
        assert self.engine is not None
        return {
            partition.param_ranges[0].name: partition.flat for partition in self.engine.partitions()
        }

    def start_microbatch(self, is_last: bool) -> None:
        """Announce a microbatch to the engine; ``is_last``: the step's last."""
        if self.engine is not None:
            self.engine.start_microbatch(is_last)

    def grad_norm_squared(self) -> float:
        """Squared norm of the head's full gradient. Collective over all ranks of the job."""
        squared = torch.zeros((), dtype=torch.float64, device=mesh.device())
        if self.engine is not None:
            self.engine.reduce_grads()

            # Collective over the head's ranks; the sum below must count it on one tensor rank only.
            grad_norm = self.engine.grad_norm()
            if self._layout.tensor_rank == 0:
                squared += grad_norm**2
        return float(mesh.all_reduce_sum_over_model(squared, self._layout))

    def step(self, grad_scale: float, lr_multiplier: float) -> None:
        """Update the head's weights and averages.

        Args:
            grad_scale: Factor on the gradients.
            lr_multiplier: Factor on the peak learning rates.
        """
        if self.engine is not None:
            self._optimizer.prepare_step(grad_scale, lr_multiplier)
            self.engine.step(self._optimizer)
            self._ema.update(self._flat_weights())
            self._has_stepped = True

    def zero_grad(self) -> None:
        """Drop the gradients."""
        # Engines drop gradients only in a step, so a skipped step is made as one without effect.
        if self.engine is not None and not self._has_stepped:
            self._optimizer.prepare_step(1.0, 0.0, skip_step=True)
            self.engine.step(self._optimizer)
        self._has_stepped = False

    def _partitions_with_state(self) -> Iterator[tuple[Partition, dict[str, Tensor]]]:
        """Yield every partition with its optimizer state and moving average, by slot."""
        if self.engine is None:
            return

        groups = {name: group for group in self._optimizer.param_groups for name in group["names"]}
        for partition in self.engine.partitions():
            name = partition.param_ranges[0].name
            # A copy, as the average is no slot of the optimizer itself.
            slots = dict(self._optimizer.get_or_init_state(partition.flat, groups[name]))
            if name in self._ema.by_name:
                slots[EMA_SLOT] = self._ema.by_name[name]
            yield partition, slots

    def full_state_dict(self) -> dict[str, Tensor]:
        """The full fp32 weights by name; none on ranks without a head. Collective over the head."""
        full_weights: dict[str, Tensor] = {}
        for partition in [] if self.engine is None else self.engine.partitions():
            gathered = partition.gather(partition.flat)
            full_weights |= {
                piece.name: piece.extract_full(gathered) for piece in partition.param_ranges
            }
        return full_weights

    def model_state_dict(self) -> dict[str, ShardedTensor]:
        """This rank's shards of the weights, in the dtype that the model computes in.

        If that is fp32, they share the partitions' memory.
        """
        param_ranges = (
            (p, piece) for p, _ in self._partitions_with_state() for piece in p.param_ranges
        )
        return {
            piece.name: p.to_sharded_tensor(piece, p.flat).to(self._dtype)
            for p, piece in param_ranges
        }

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Context in which this rank's model has a copy of the full head, and can be evaluated.

        Collective over the ranks of the head; a no-op on others.
        """
        if self.engine is None:
            yield
            return

        sharded = self._model.head
        full_head = cast_weights(
            build_head(self._config, self._model.codes.num_bits).to(mesh.device()), self._config
        )
        full_head.load_state_dict(
            {
                name.removeprefix("head."): whole.to(self._dtype)
                for name, whole in self.full_state_dict().items()
            }
        )

        self._model.head = full_head
        try:
            yield
        finally:
            self._model.head = sharded

    def optimizer_state_dict(self) -> dict[str, ShardedTensor]:
        """This rank's shards of the optimizer state, by ``NAME.SLOT`` as in ``Optimizers``."""
        state: dict[str, ShardedTensor] = {}
        for partition, slots in self._partitions_with_state():
            # In fp32 the partitions are the weights, which model_state_dict has.
            master_weights = (
                {MASTER_WEIGHT_SLOT: partition.flat} if self._dtype != torch.float32 else {}
            )

            for slot, value in {**slots, **master_weights}.items():
                for param_range in partition.param_ranges:
                    # The step count of a partition is that of each tensor in it.
                    local = (
                        ShardedTensor.from_full(value)
                        if slot == STEP_SLOT
                        else partition.to_sharded_tensor(param_range, value)
                    )
                    state[f"{param_range.name}.{slot}"] = local
        return state

    def sync_model_weights(self) -> None:
        """Bring the model in line with partitions into which a checkpoint was loaded."""
        if self.engine is not None:
            self.engine.sync_model_weights()
