"""Full tensors: every replica has all gradients and updates all tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from bitlm_dist.model.initialization import shard_dim
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import SINGLE_PROCESS, ParallelLayout
from bitlm_dist.parallel.partition import ParamRange, Partition
from bitlm_dist.training.partitioners.base import Partitioner, local_grad_norm_squared
from bitlm_dist.training.partitioners.tensor_parallel import TensorParallelRange


class ReplicatedPartitioner(Partitioner):
    """Partitions are full tensors, or a tensor-parallel rank's shards of them.

    Args:
        named: this rank's trainable tensors by their names in the full model. Gradients are read
            from ``main_grad``, where Megatron's data parallelism puts them, else from ``grad``.
        layout: the job's parallel layout.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], layout: ParallelLayout = SINGLE_PROCESS
    ) -> None:
        super().__init__(layout)
        self._named = dict(named)
        self.partitions = [self._build_partition(n, p) for n, p in named.items()]

    def _build_partition(self, name: str, parameter: nn.Parameter) -> Partition:
        # Weights in bf16 are updated in an fp32 copy: small updates would be rounded away.
        flat = parameter.detach().float()
        numel = slice(0, flat.numel())
        num_shards = self._layout.tensor
        if num_shards == 1 or shard_dim(name) is None:
            return Partition(flat, [ParamRange(name, flat.shape, [numel])], parameter.dtype)

        param_range = TensorParallelRange.of_shard(name, flat.shape, num_shards, [flat.numel()])
        return Partition(flat, [param_range], parameter.dtype, mesh.tensor_group())

    @override
    def reduce_grads(self) -> None:
        # Megatron's data parallelism accumulates gradients in buffers of its own.
        grads = {n: getattr(p, "main_grad", p.grad) for n, p in self._named.items()}
        self._grads = {n: grad.float() for n, grad in grads.items() if grad is not None}
        for partition in self.partitions:
            partition.flat.grad = self._grads.get(partition.name)

    @override
    def grad_norm_squared(self) -> Tensor:
        local = local_grad_norm_squared([*self._grads.items()], self._layout)
        return mesh.all_reduce_sum_over_model(local, self._layout)

    @override
    @torch.no_grad()
    def sync_model_weights(self) -> None:
        for partition in self.partitions:
            if partition.weight_dtype != torch.float32:
                self._named[partition.name].copy_(partition.flat)

    @override
    def zero_grad(self) -> None:
        super().zero_grad()
        self._grads = {}
        for parameter in self._named.values():
            parameter.grad = None
