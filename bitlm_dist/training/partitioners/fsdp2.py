"""The head under torch's FSDP2, as an alternative to ZeRO.

Gradients and optimizer state are sharded; at stage 3 the weights stay sharded between forward and
backward, too. Weights are kept in fp32; with ``training.precision: bf16`` they are gathered in
bf16.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from typing_extensions import override

from bitlm_dist.config import Config
from bitlm_dist.model.head_loss import HeadBatch, HeadLoss
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.partition import ParamRange, Partition
from bitlm_dist.training.partitioners.base import HeadPartitioner


class FSDP2Partitioner(HeadPartitioner):
    """Partitions are this rank's rows of each tensor.

    Args:
        config: the checked config.
        module: the module with the head's parameters; its forward returns this rank's part of the
            loss. Its head's blocks are gathered one by one, the rest at once.
        layout: the job's parallel layout.
        group_key: unused, as each partition has one tensor.
    """

    def __init__(
        self,
        config: Config,
        module: HeadLoss,
        layout: ParallelLayout,
        group_key: Callable[[str, Tensor], Hashable],
    ) -> None:
        super().__init__(layout)
        device_mesh = mesh.head_device_mesh()
        self._group = device_mesh.get_group(-1)  # of the shards; other copies have the same
        settings: dict[str, Any] = {
            "mesh": device_mesh,
            "reshard_after_forward": config.parallel.head.zero_stage == 3,
        }
        if config.training.precision != "fp32":
            settings["mp_policy"] = MixedPrecisionPolicy(
                torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )

        weight_dtype = next(module.parameters()).dtype
        self._module: Any = module.float()
        for part in (*module.head.blocks, module):
            fully_shard(part, **settings)
            # each rank has a part of one loss, so gradients are summed, not averaged
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)

        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self.partitions = [
            self._build_partition(n, p, weight_dtype) for n, p in self._parameters.items()
        ]

    def _build_partition(self, name: str, parameter: Any, weight_dtype: torch.dtype) -> Partition:
        # FSDP2 shards rows; the last ranks may have fewer of them
        shape = parameter.shape
        num_ranks = dist.get_world_size(self._group)
        shard_numel = -(-shape[0] // num_ranks) * (shape.numel() // shape[0])

        # the optimizer sees plain tensors in the same memory
        return Partition(
            parameter.to_local().detach(),
            [ParamRange.split(name, shape, 0, num_ranks, shard_numel)],
            weight_dtype,
            self._group,
            shard_numel,
        )

    @override
    def __call__(self, batch: HeadBatch) -> tuple[Tensor, Tensor]:
        loss, terms = self._module(batch)
        return loss, terms

    @override
    def start_microbatch(self, is_last: bool) -> None:
        # the gradients of each microbatch are reduced at once
        self._module.set_is_last_backward(is_last)

    @override
    def reduce_grads(self) -> None:
        for parameter, partition in zip(self._parameters.values(), self.partitions, strict=True):
            partition.flat.grad = None if parameter.grad is None else parameter.grad.to_local()

    @override
    def grad_norm(self) -> Tensor:
        grads = [p.flat.grad for p in self.partitions if p.flat.grad is not None]

        # the ranks' rows are disjoint, so squared norms add up
        norm_squared = torch.stack(torch._foreach_norm(grads)).square().sum()
        dist.all_reduce(norm_squared, group=self._group)
        return norm_squared.sqrt()

    @override
    def zero_grad(self) -> None:
        super().zero_grad()
        for parameter in self._parameters.values():
            parameter.grad = None
