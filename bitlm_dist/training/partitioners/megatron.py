"""Slices of the gradient buffers of Megatron-core's data parallelism.

With ``use_distributed_optimizer`` it reduce-scatters the gradients of every bucket and all-gathers
the weights. A rank updates its slice of each bucket, which may begin or end inside a tensor. The
buckets are sharded over all replicas, or over each of several instances of the optimizer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from bitlm_dist.model.initialization import shard_dim
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.partition import ParamRange, Partition
from bitlm_dist.training.partitioners.base import Partitioner, local_grad_norm_squared
from bitlm_dist.training.partitioners.tensor_parallel import TensorParallelRange


class MegatronPartitioner(Partitioner):
    """Partitions are this rank's slices of tensors, one per tensor; some are empty.

    Args:
        ddp_chunks: the stages, wrapped in Megatron's DDP with ``use_distributed_optimizer``.
        named: their parameters by name in the full model.
        layout: the job's parallel layout.
    """

    def __init__(
        self, ddp_chunks: Sequence[Any], named: Mapping[str, nn.Parameter], layout: ParallelLayout
    ) -> None:
        super().__init__(layout)
        self._ddp_chunks = ddp_chunks
        buckets = {
            parameter: bucket.param_data
            for chunk in ddp_chunks
            for buffer in chunk.buffers
            for bucket in buffer.buckets
            for parameter in bucket.params
        }

        # This rank's slices of the model's own weights and gradients, one pair per partition.
        self._slices: list[tuple[Tensor, Tensor]] = []
        for name, parameter in named.items():
            bucket = buckets[parameter]
            sizes = ParamRange.contiguous(
                name,
                parameter.shape,
                parameter.storage_offset() - bucket.storage_offset(),
                layout.num_optimizer_shards,
                bucket.numel() // layout.num_optimizer_shards,
            ).numel_per_row

            weight, grad = (
                flat.view(-1).split(sizes)[layout.optimizer_shard_rank]
                for flat in (parameter.detach(), parameter.main_grad)  # type: ignore[attr-defined]
            )
            self._slices.append((weight, grad))
            self.partitions.append(self._build_partition(name, parameter, weight, sizes))

    def _build_partition(
        self, name: str, parameter: nn.Parameter, weight: Tensor, sizes: list[int]
    ) -> Partition:
        """The partition with this rank's slice, out of slices of the given sizes."""
        num_tensor_ranks = self._layout.tensor
        if num_tensor_ranks == 1 or shard_dim(name) is None:
            param_range = ParamRange(name, parameter.shape, [slice(0, n) for n in sizes])
            group = mesh.optimizer_group()
        else:
            param_range = TensorParallelRange.of_shard(
                name, parameter.shape, num_tensor_ranks, sizes
            )
            group = mesh.optimizer_and_tensor_group()
        return Partition(weight.float(), [param_range], weight.dtype, group)

    @override
    def reduce_grads(self) -> None:
        for partition, (_, grad) in zip(self.partitions, self._slices, strict=True):
            partition.flat.grad = grad.float()

    @override
    def grad_norm_squared(self) -> Tensor:
        grads = [(p.name, p.grad) for p in self.partitions if p.flat.numel()]
        # All instances of the optimizer have these gradients, and the sum must count them once.
        counted = local_grad_norm_squared(grads, self._layout) * self._layout.is_first_instance
        return mesh.all_reduce_sum(counted)

    @override
    @torch.no_grad()
    def sync_model_weights(self) -> None:
        for partition, (weight, _) in zip(self.partitions, self._slices, strict=True):
            if partition.weight_dtype != torch.float32:
                weight.copy_(partition.flat)
        for chunk in self._ddp_chunks:
            if not chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync()
            # Otherwise the next forward pass gathers each bucket while it computes on the one
            # before, by Megatron's hooks.
            for group in chunk.bucket_groups:
                group.param_gather_dispatched = False

    @override
    def finish_weight_sync(self) -> None:
        for chunk in self._ddp_chunks:
            for group in chunk.bucket_groups if chunk.ddp_config.overlap_param_gather else ():
                group.finish_param_sync(skip_next_bucket_dispatch=True)
