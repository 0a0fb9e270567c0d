"""AdamW through Megatron-core's distributed optimizer.

Every data-parallel rank keeps the optimizer state of its slice of the gradient buffers.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.cpu import tensors_named_as_on_cuda
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.training import fused_adam
from bitlm_dist.training.config import OptimizerConfig
from bitlm_dist.training.optimizer import (
    EMA,
    EMA_SLOT,
    MASTER_WEIGHT_SLOT,
    local_grad_norm_squared,
    param_group_options,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


class ParamShard(NamedTuple):
    """This rank's shard of a parameter."""

    name: str
    flat: Tensor  # the fp32 elements that AdamW updates
    flat_range: slice  # their range in the flattened parameter
    group: dict[str, Any]  # the optimizer's parameter group


class DistributedAdamW:
    """Drop-in replacement of :class:`~bitlm_dist.training.optimizer.Optimizers` for AdamW.

    The updates are numerically the same.

    Args:
        ddp_chunks: the stages, wrapped in Megatron's DDP with ``use_distributed_optimizer``.
        named: their parameters by name in the full model.
        config: the optimizer config; ``matrix_optimizer`` must be ``adamw``.
        layout: the parallel layout of the job.
    """

    def __init__(
        self,
        ddp_chunks: Sequence[Any],
        named: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        layout: ParallelLayout,
    ) -> None:
        from megatron.core.optimizer import OptimizerConfig as Settings
        from megatron.core.optimizer import get_megatron_optimizer

        # in fp32 the weights are their own masters
        bf16 = next(iter(named.values())).dtype == torch.bfloat16
        self._saved_slots = (
            *MOMENTS,
            *((MASTER_WEIGHT_SLOT,) if bf16 else ()),
            *((EMA_SLOT,) if config.ema else ()),
        )

        settings = Settings(
            optimizer="adam",
            lr=config.adamw_lr,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            weight_decay=1.0,  # multiplied by that of each group
            bf16=bf16,
            use_distributed_optimizer=True,
            clip_grad=0.0,  # clip_and_step clips, so that a non-finite norm can skip the step
        )
        with tensors_named_as_on_cuda(), fused_adam.selected_in_megatron(config.fused):
            chained = get_megatron_optimizer(
                settings,
                list(ddp_chunks),
                _param_group_overrides(named, config),
                use_gloo_process_groups=False,
            )

        # Megatron leaves the weight decay of a group to its own scheduler, which is not used here
        for group in chained.param_groups:
            group["weight_decay"] = group["wd_mult"]
            if "fused" in group:  # torch's AdamW
                group["fused"] = True

        (self._distributed_optimizer,) = chained.chained_optimizers
        self._chained_optimizer = chained
        self._named = dict(named)
        self.layout = layout
        self._ema = EMA(config.ema, {shard.name: shard.flat for shard in self._shards()})

    def _shards(self) -> Iterator[ParamShard]:
        """Yield the shard of every parameter that overlaps this rank's slice of the buffers."""
        inner = self._distributed_optimizer

        for name, parameter in self._named.items():
            if parameter in inner.model_param_gbuf_map:
                param_range = inner._get_model_param_range_map(parameter)["param"]
                flat = inner._get_main_param_and_optimizer_states(parameter)["param"]
                group = inner.optimizer.param_groups[
                    inner.model_param_group_index_map[parameter][0]
                ]
                yield ParamShard(name, flat, slice(param_range.start, param_range.end), group)

    def grad_norm_squared(self) -> float:
        """Squared norm of the full gradient. Collective."""
        self._chained_optimizer.prepare_grads()
        return float(mesh.all_reduce_sum(local_grad_norm_squared(self._local_grads(), self.layout)))

    def _local_grads(self) -> list[tuple[str, Tensor]]:
        return [
            (shard.name, shard.flat.grad) for shard in self._shards() if shard.flat.grad is not None
        ]

    def step(self, grad_scale: float, lr_multiplier: float) -> None:
        """Update the weights and their moving averages. Collective.

        Args:
            grad_scale: factor on the gradients.
            lr_multiplier: factor on the peak learning rates.
        """
        torch._foreach_mul_([grad for _, grad in self._local_grads()], grad_scale)
        for group in self._chained_optimizer.param_groups:
            group["lr"] = group["max_lr"] * lr_multiplier

        # grad_norm_squared has already called prepare_grads
        self._chained_optimizer.step_with_ready_grads()
        self._ema.update({shard.name: shard.flat for shard in self._shards()})

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self._chained_optimizer.zero_grad()

    def _shard_state(self, shard: ParamShard) -> dict[str, Tensor]:
        """AdamW's state of a shard, the fp32 shard itself, and its moving average if any."""
        slots = {
            **fused_adam.get_or_init_state(
                self._distributed_optimizer.optimizer, shard.flat, shard.group
            ),
            MASTER_WEIGHT_SLOT: shard.flat.detach(),
        }
        average = self._ema.by_name.get(shard.name)
        return slots if average is None else {**slots, EMA_SLOT: average}

    def state_dict(self) -> dict[str, ShardedTensor]:
        """This rank's shards of the optimizer state, named as :meth:`Optimizers.state_dict`."""
        state = {}
        for shard in self._shards():
            slots = self._shard_state(shard)
            shape = self._named[shard.name].shape

            # the step count is a scalar, which every rank holds in full
            state[f"{shard.name}.step"] = ShardedTensor.from_full(slots["step"])
            for slot in self._saved_slots:
                state[f"{shard.name}.{slot}"] = ShardedTensor.from_flat_range(
                    shape, shard.flat_range.start, slots[slot]
                )
        return state

    def load_state_dict(self, state_dict: Mapping[str, ShardedTensor]) -> None:
        """Finish loading what was read into the tensors of :meth:`state_dict`."""
        # moments, masters and averages were loaded in place
        for shard in self._shards():
            fused_adam.set_step_count(
                self._distributed_optimizer.optimizer,
                shard.flat,
                shard.group,
                state_dict[f"{shard.name}.step"].full,
            )


def _param_group_overrides(
    named: Mapping[str, nn.Parameter], config: OptimizerConfig
) -> dict[Any, Any]:
    """Convert the :func:`param_group_options` of every parameter to Megatron's overrides."""
    from megatron.core.optimizer import ParamGroupOverride
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    members_by_options: dict[tuple[float, float], set[nn.Parameter]] = defaultdict(set)
    for name, parameter in named.items():
        members_by_options[param_group_options(config, name, parameter)].add(parameter)

    return {
        ParamKey(
            predicate=ParamPredicate(f"{scale} {decay}", members.__contains__)
        ): ParamGroupOverride(max_lr=config.adamw_lr * scale, wd_mult=decay)
        for (scale, decay), members in members_by_options.items()
    }
