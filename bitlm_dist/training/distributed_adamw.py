"""AdamW through Megatron-core's distributed optimizer: every data-parallel rank keeps the state of its slice of the gradients."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitlm_dist.config import OptimizerConfig
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.cpu import tensors_named_as_on_cuda
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.parallel.sliced import Sliced
from bitlm_dist.training import fused_adam
from bitlm_dist.training.optimizer import AVERAGE, MASTER, Averages, rule_of, sum_of_squares

MOMENTS = ("exp_avg", "exp_avg_sq")


class Shard(NamedTuple):
    """This rank's part of a tensor: what AdamW updates, where it lies in the flat tensor, and its parameter group."""

    name: str
    flat: Tensor
    place: slice
    group: dict[str, Any]


class DistributedAdamW:
    """Same interface as :class:`~bitlm_dist.training.optimizer.Optimizers`, and the same numbers.

    Args:
        wrapped: the stages in Megatron's data parallelism with ``use_distributed_optimizer``.
        named: their tensors by names in the whole model.
        config: ``matrices`` is ``adamw``.
        layout: of the job.
    """

    def __init__(self, wrapped: Sequence[Any], named: Mapping[str, nn.Parameter], config: OptimizerConfig, layout: Layout) -> None:
        from megatron.core.optimizer import OptimizerConfig as Settings
        from megatron.core.optimizer import get_megatron_optimizer

        bf16 = next(iter(named.values())).dtype == torch.bfloat16
        # in fp32 the weights are their own masters
        self._saved = (*MOMENTS, *((MASTER,) if bf16 else ()), *((AVERAGE,) if config.ema else ()))
        settings = Settings(
            optimizer="adam",
            lr=config.lr,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            weight_decay=1.0,  # times that of each group
            bf16=bf16,
            use_distributed_optimizer=True,
            clip_grad=0.0,  # clipped here: only here a norm that is not finite is known in time to skip the step
        )
        with tensors_named_as_on_cuda(), fused_adam.chosen_in_megatron(config.fused):
            chained = get_megatron_optimizer(settings, list(wrapped), _rules(named, config), use_gloo_process_groups=False)
        for group in chained.param_groups:  # Megatron leaves this to its scheduler
            group["weight_decay"] = group["wd_mult"]
            if "fused" in group:  # torch's
                group["fused"] = True
        (self._inner,) = chained.chained_optimizers
        self._chained, self._named, self.layout = chained, dict(named), layout
        self._averages = Averages(config.ema, {shard.name: shard.flat for shard in self._shards()})

    def _shards(self) -> Iterator[Shard]:
        inner = self._inner
        for name, parameter in self._named.items():
            if parameter in inner.model_param_gbuf_map:
                place = inner._get_model_param_range_map(parameter)["param"]
                flat = inner._get_main_param_and_optimizer_states(parameter)["param"]
                group = inner.optimizer.param_groups[inner.model_param_group_index_map[parameter][0]]
                yield Shard(name, flat, slice(place.start, place.end), group)

    def squares(self) -> float:
        """See :class:`~bitlm_dist.training.optimizer.Part`."""
        self._chained.prepare_grads()
        return float(mesh.sum_over_all(sum_of_squares(self._gradients(), self.layout)))

    def _gradients(self) -> list[tuple[str, Tensor]]:
        return [(shard.name, shard.flat.grad) for shard in self._shards() if shard.flat.grad is not None]

    def update(self, scale: float, factor: float) -> None:
        """See :class:`~bitlm_dist.training.optimizer.Part`."""
        torch._foreach_mul_([grad for _, grad in self._gradients()], scale)
        for group in self._chained.param_groups:
            group["lr"] = group["max_lr"] * factor
        self._chained.step_with_ready_grads()
        self._averages.follow({shard.name: shard.flat for shard in self._shards()})

    def clear(self) -> None:
        """See :class:`~bitlm_dist.training.optimizer.Part`."""
        self._chained.zero_grad()

    def _slots(self, shard: Shard) -> dict[str, Tensor]:
        """AdamW's state of a shard, the shard itself, which is fp32, and its average."""
        slots = {**fused_adam.fill(self._inner.optimizer, shard.flat, shard.group), MASTER: shard.flat.detach()}
        average = self._averages.by_name.get(shard.name)
        return slots if average is None else {**slots, AVERAGE: average}

    def state(self) -> dict[str, Sliced]:
        """See :meth:`Optimizers.state`: what this rank has of each tensor."""
        found = {}
        for shard in self._shards():
            slots, shape = self._slots(shard), self._named[shard.name].shape
            found[f"{shard.name}.step"] = Sliced.whole(slots["step"])
            for slot in self._saved:
                found[f"{shard.name}.{slot}"] = Sliced.of_range(shape, shard.place.start, slots[slot])
        return found

    def restore(self, state: Mapping[str, Sliced]) -> None:
        """See :meth:`Optimizers.restore`."""
        for shard in self._shards():
            fused_adam.set_step(self._inner.optimizer, shard.flat, shard.group, state[f"{shard.name}.step"].tensor)


def _rules(named: Mapping[str, nn.Parameter], config: OptimizerConfig) -> dict[Any, Any]:
    """:func:`rule_of` of every tensor, as Megatron takes it."""
    from megatron.core.optimizer import ParamGroupOverride
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    rules: dict[tuple[float, float], set[nn.Parameter]] = defaultdict(set)
    for name, parameter in named.items():
        rules[rule_of(config, name, parameter)].add(parameter)
    return {
        ParamKey(predicate=ParamPredicate(f"{scale} {decay}", members.__contains__)): ParamGroupOverride(
            max_lr=config.lr * scale, wd_mult=decay
        )
        for (scale, decay), members in rules.items()
    }
