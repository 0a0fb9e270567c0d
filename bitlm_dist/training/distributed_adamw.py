"""AdamW through Megatron-core's distributed optimizer: every data-parallel rank keeps the state of its slice of the gradients."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitlm_dist.config import OptimizerConfig
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.cpu import tensors_named_as_on_cuda
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.training.optimizer import MASTER, clip_scale, sum_of_squares

MOMENTS = ("exp_avg", "exp_avg_sq")


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
        from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

        settings = Settings(
            optimizer="adam",
            lr=config.lr,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            weight_decay=config.weight_decay,
            bf16=next(iter(named.values())).dtype == torch.bfloat16,
            use_distributed_optimizer=True,
            clip_grad=0.0,  # clipped here: only here a norm that is not finite is known in time to skip the step
        )
        overrides = get_standard_config_overrides(settings)  # vectors do not decay
        with tensors_named_as_on_cuda():
            chained = get_megatron_optimizer(settings, list(wrapped), overrides, use_gloo_process_groups=False)
        for group in chained.param_groups:  # Megatron leaves this to its scheduler
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
        (self._inner,) = chained.chained_optimizers
        self._chained, self._named, self.layout = chained, dict(named), layout
        self.clip_norm, self._peak = config.clip_norm, config.lr

    def _shards(self) -> Iterator[tuple[str, Tensor, slice]]:
        """Name of a tensor, this rank's flat shard of it that AdamW updates, and where that lies in the flat tensor."""
        for name, parameter in self._named.items():
            if parameter in self._inner.model_param_gbuf_map:
                place = self._inner._get_model_param_range_map(parameter)["param"]
                shard = self._inner._get_main_param_and_optimizer_states(parameter)["param"]
                yield name, shard, slice(place.start, place.end)

    def step(self, factor: float) -> tuple[float, bool]:
        """See :meth:`Optimizers.step`."""
        self._chained.prepare_grads()
        grads = [(name, shard.grad) for name, shard, _ in self._shards() if shard.grad is not None]
        norm = float(mesh.sum_over_all(sum_of_squares(grads, self.layout)).sqrt())
        finite = math.isfinite(norm)
        if finite:
            torch._foreach_mul_([grad for _, grad in grads], clip_scale(norm, self.clip_norm))
            for group in self._chained.param_groups:
                group["lr"] = self._peak * factor
            self._chained.step_with_ready_grads()
        self._chained.zero_grad()
        return norm, finite

    def _slots(self, shard: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a shard, made if no step has been taken, and the shard itself."""
        state: dict[str, Tensor] = self._inner.optimizer.state[shard]
        if not state:
            state |= {slot: torch.zeros_like(shard) for slot in MOMENTS}
            state["step"] = torch.zeros((), dtype=torch.float32)
        return {**state, MASTER: shard.detach()}

    @staticmethod
    def _saved(parameter: Tensor) -> tuple[str, ...]:
        return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MASTER)

    def state(self) -> dict[str, Tensor]:
        """See :meth:`Optimizers.state`: whole tensors, gathered from the data-parallel ranks; :meth:`restore` takes them back."""
        found = {}
        shards = {name: (shard, place) for name, shard, place in self._shards()}
        for name, parameter in self._named.items():
            step = torch.zeros((), device=parameter.device)
            flat = {slot: torch.zeros(parameter.numel(), device=parameter.device) for slot in self._saved(parameter)}
            if name in shards:
                shard, place = shards[name]
                slots = self._slots(shard)
                step += slots["step"]
                for slot, whole in flat.items():
                    whole[place] = slots[slot]
            torch.distributed.all_reduce(step, torch.distributed.ReduceOp.MAX, group=mesh.data_group())
            for slot, whole in flat.items():
                torch.distributed.all_reduce(whole, group=mesh.data_group())
                found[f"{name}.{slot}"] = whole.view_as(parameter)
            found[f"{name}.step"] = step
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint has loaded into :meth:`state`'s tensors."""
        for name, shard, place in self._shards():
            slots = self._slots(shard)
            slots["step"].copy_(state[f"{name}.step"])
            for slot in self._saved(self._named[name]):
                slots[slot].copy_(state[f"{name}.{slot}"].flatten()[place])
