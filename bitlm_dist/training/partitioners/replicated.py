"""Full tensors: all replicas have all gradients, and each updates all tensors or some of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from bitlm_dist.model.initialization import shard, shard_dim, unshard
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import SINGLE_PROCESS, ParallelLayout
from bitlm_dist.parallel.partition import ParamRange, Partition, assign_owners
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.training.partitioners.base import Partitioner, local_grad_norm_squared


@dataclass(frozen=True)
class TensorParallelRange(ParamRange):
    """A parameter of which every row is the shard of a tensor-parallel rank."""

    local_shape: torch.Size

    @override
    def extract_full(self, buffer: Tensor) -> Tensor:
        return unshard(self.name, [row.view(self.local_shape) for row in buffer])

    @override
    def insert_full(self, buffer: Tensor, full: Tensor) -> None:
        for rank, row in enumerate(buffer):
            row.copy_(shard(self.name, full, rank, len(buffer)).flatten())

    @override
    def to_sharded_tensor(self, row: Tensor, rank: int) -> ShardedTensor:
        # Checkpoints turn the shards of all weights into those of full tensors in one place.
        return ShardedTensor.from_full(row.view(self.local_shape))


class ReplicatedPartitioner(Partitioner):
    """Partitions are full tensors, or a tensor-parallel rank's shards of them.

    Args:
        named: this rank's trainable tensors by their names in the full model. Gradients are read
            from ``main_grad``, where Megatron's data parallelism puts them, else from ``grad``.
        layout: the job's parallel layout.
        sharded: every replica updates some of the tensors, and broadcasts them to the others (as in
            ZeRO-1, but with full tensors); False: every replica updates all.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        layout: ParallelLayout = SINGLE_PROCESS,
        sharded: bool = False,
    ) -> None:
        super().__init__(layout)
        self._named = dict(named)
        self._num_owners = layout.num_replicas if sharded else 1
        self._owners = assign_owners({n: p.numel() for n, p in named.items()}, self._num_owners)
        rank = layout.replica_rank % self._num_owners
        self.partitions = [
            self._build_partition(n, p) for n, p in named.items() if self._owners[n] == rank
        ]

    def _build_partition(self, name: str, parameter: nn.Parameter) -> Partition:
        # Weights in bf16 are updated in an fp32 copy: small updates would be rounded away.
        flat = parameter.detach().float()
        numel = slice(0, flat.numel())
        num_shards = self._layout.tensor
        if num_shards == 1 or shard_dim(name) is None:
            return Partition(flat, [ParamRange(name, flat.shape, [numel])], parameter.dtype)

        full_shape = unshard(name, [torch.empty_like(flat, device="meta")] * num_shards).shape
        param_range = TensorParallelRange(name, full_shape, [numel] * num_shards, flat.shape)
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
        if self._num_owners == 1:
            return

        for owner in range(self._num_owners):
            tensors = [p for n, p in self._named.items() if self._owners[n] == owner]
            if tensors:
                # One broadcast per owner instead of one per tensor.
                flat = torch.cat([tensor.flatten() for tensor in tensors])
                dist.broadcast(flat, group=mesh.replica_group(), group_src=owner)
                parts = flat.split([tensor.numel() for tensor in tensors])
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    @override
    def zero_grad(self) -> None:
        super().zero_grad()
        self._grads = {}
        for parameter in self._named.values():
            parameter.grad = None
