"""Update rules by parameter group, over the partitions of any partitioner.

By default Muon updates the matrices of backbone layers and head blocks, AdamW the rest. One
schedule scales the learning rates of all groups.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import NamedTuple

import torch
from torch import Tensor

from bitlm_dist.parallel.partition import Partition
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.registry import OPTIMIZERS
from bitlm_dist.training.config import OptimizerConfig
from bitlm_dist.training.optimizers.base import UpdateRule
from bitlm_dist.training.partitioners.base import Partitioner

DEFAULT_OPTIMIZER = "adamw"  # of all that `optimizer.matrix_optimizer` does not update
MASTER_WEIGHT_SLOT = "master"
EMA_SLOT = "ema"


class ParamGroup(NamedTuple):
    """Options of a parameter; those with equal options form a group."""

    optimizer: str  # a name in OPTIMIZERS
    lr_scale: float  # factor on the optimizer's peak learning rate
    weight_decay: float


def is_inner_matrix(name: str, parameter: Tensor) -> bool:
    """True if ``optimizer.matrix_optimizer`` updates a parameter.

    These are the matrices of backbone layers and of head blocks, and stacks of matrices.
    """
    is_stack = parameter.dim() == 3 and name.startswith("head.lookahead.")
    is_inner = ".layers." in name or name.startswith(("head.blocks.", "head.lookahead."))
    return is_stack or (is_inner and parameter.dim() == 2)


def param_group(config: OptimizerConfig, name: str, parameter: Tensor) -> ParamGroup:
    """The options of a parameter; vectors and scalars have no weight decay."""
    part = name.partition(".")[0]
    component = {"backbone": config.backbone, "embedding": config.input}.get(part, config.head)

    optimizer = config.matrix_optimizer if is_inner_matrix(name, parameter) else DEFAULT_OPTIMIZER
    decay = config.weight_decay if component.weight_decay is None else component.weight_decay
    return ParamGroup(optimizer, component.lr_scale, decay if parameter.dim() >= 2 else 0.0)


def load_update_rules(config: OptimizerConfig) -> dict[str, UpdateRule]:
    """The update rules of a config by their names in OPTIMIZERS."""
    names = dict.fromkeys((DEFAULT_OPTIMIZER, config.matrix_optimizer))
    return {name: resolve_name(OPTIMIZERS[name])(config) for name in names}


def clip_coefficient(grad_norm: Tensor, max_grad_norm: float) -> Tensor:
    """The factor that brings a gradient's norm down to ``max_grad_norm``; 0 there never clips."""
    limit = torch.full_like(grad_norm, max_grad_norm or math.inf)
    return (limit / (grad_norm + 1e-6)).clamp(max=1.0)


class Optimizer:
    """Updates the partitions of all partitioners by the joint norm of their gradients.

    The state of a partition is created here and stays in :attr:`Partition.state`.

    Args:
        config: learning rates are peaks; :meth:`clip_and_step` takes the schedule's multiplier.
        partitioners: partitioners of all trainable tensors of this rank; all ranks must have the
            same ones in the same order.
    """

    def __init__(self, config: OptimizerConfig, partitioners: Sequence[Partitioner]) -> None:
        self._config = config
        self.partitioners = partitioners
        partitions = [p for partitioner in partitioners for p in partitioner.partitions]
        self.partitions = [p for p in partitions if p.flat.numel()]
        self._rules = load_update_rules(config)
        self._groups: dict[str, ParamGroup] = {}

        for partition in partitions:
            first = partition.param_ranges[0]
            group = param_group(config, first.name, torch.empty(first.shape, device="meta"))
            self._groups[partition.name] = group
            partition.state |= self._rules[group.optimizer].init_state(partition.flat.detach())
            if config.ema:
                partition.state[EMA_SLOT] = partition.flat.detach().clone()

    def clip_and_step(self, lr_multiplier: float) -> tuple[Tensor, Tensor]:
        """Clip the joint gradient norm, update all partitions, drop the gradients. Collective.

        The host does not wait for the device: if the norm is not finite, nothing changes, which is
        decided on the device.

        Args:
            lr_multiplier: factor on the peak learning rates.

        Returns:
            The norm before clipping, fp64 [], and whether the update was applied, bool [].
        """
        squares = []
        for partitioner in self.partitioners:
            partitioner.reduce_grads()
            squares.append(partitioner.grad_norm_squared().double())

        # On a CPU only the complex square root is rounded correctly, as math.sqrt is.
        grad_norm = torch.stack(squares).sum().to(torch.complex128).sqrt().real
        applied = grad_norm.isfinite()
        grad_scale = clip_coefficient(grad_norm, self._config.max_grad_norm).float()

        @torch.no_grad()
        def update(partitions: Sequence[Partition]) -> None:
            members: dict[ParamGroup, list[Partition]] = defaultdict(list)
            for partition in partitions:
                group = self._groups[partition.name]
                # An empty partition matters only if this rank may map its full tensor for others.
                is_elementwise = self._rules[group.optimizer].is_elementwise
                is_needed = not is_elementwise or partition.flat.numel() > 0
                if is_needed and partition.flat.grad is not None:
                    members[group].append(partition)

            for group, in_group in members.items():
                # Only offloaded partitions are on another device.
                device = in_group[0].flat.device
                local_applied = applied.to(device)
                torch._foreach_mul_([p.grad for p in in_group], grad_scale.to(device))

                rule = self._rules[group.optimizer]
                lr = rule.peak_lr * group.lr_scale * lr_multiplier
                rule.update(in_group, lr, group.weight_decay, local_applied)

                # The averages take the fp32 weights, before these are rounded for the model.
                ema_weight = (1 - self._config.ema) * local_applied.float()
                for partition in in_group if self._config.ema else ():
                    partition.state[EMA_SLOT].lerp_(partition.flat, ema_weight)

        for partitioner in self.partitioners:
            partitioner.step(update)
        return grad_norm, applied

    def state_dict(self) -> dict[str, ShardedTensor]:
        """This rank's shards of the optimizer state by ``NAME.SLOT``.

        They share the optimizer's memory: save them, or load into them and pass them to
        :meth:`load_state_dict`. The slot ``master`` holds the fp32 copy of a weight in bf16,
        ``ema`` its moving average, if there is one.
        """
        state = {}
        for partition in self.partitions:
            is_master = partition.weight_dtype != torch.float32
            master_weights = {MASTER_WEIGHT_SLOT: partition.flat} if is_master else {}
            for slot, value in (partition.state | master_weights).items():
                for name, local in partition.to_sharded_tensors(value).items():
                    state[f"{name}.{slot}"] = local
        return state

    def load_state_dict(self, state_dict: Mapping[str, ShardedTensor]) -> None:
        """Load tensors with the names and shards of :meth:`state_dict`. Collective.

        The model's weights follow master weights that were loaded.
        """
        for name, tensor in self.state_dict().items():
            for target, source in zip(tensor.shards, state_dict[name].shards, strict=True):
                target.tensor.copy_(source.tensor)
        for partitioner in self.partitioners:
            partitioner.sync_model_weights()


def learning_rates(config: OptimizerConfig, lr_multiplier: float) -> dict[str, float]:
    """The learning rates of a step by their metrics' names, such as ``lr_adamw`` and ``lr_muon``.

    Args:
        config: peak learning rates.
        lr_multiplier: factor of the schedule, see :func:`lr_multiplier_at`.
    """
    rules = load_update_rules(config)
    return {f"lr_{name}": rule.peak_lr * lr_multiplier for name, rule in rules.items()}


def lr_multiplier_at(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The factor on peak learning rates at a step: linear warm-up, then the configured decay.

    Args:
        config: Schedule, warm-up and final factor.
        step: 0-based index of the update.
        num_steps: Updates of the whole run.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps

    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * max(0.0, decay)
