"""Slices of the gradient buffers of Megatron-core's data parallelism.

With ``use_distributed_optimizer`` it reduce-scatters the gradients of every bucket and all-gathers
the weights. A rank updates its slice of each bucket, which may begin or end inside a tensor.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.partition import ParamRange, Partition
from bitlm_dist.training.partitioners.base import Partitioner, local_grad_norm_squared


class MegatronPartitioner(Partitioner):
    """Partitions are this rank's slices of tensors, so the optimizer must be elementwise.

    Args:
        ddp_chunks: the stages, wrapped in Megatron's DDP with ``use_distributed_optimizer``.
        named: their parameters by name in the full model.
        layout: the job's parallel layout.
    """

    def __init__(
        self,
        ddp_chunks: Sequence[Any],
        named: Mapping[str, nn.Parameter],
        layout: ParallelLayout,
    ) -> None:
        self._ddp_chunks = ddp_chunks
        self._layout = layout
        buckets = {
            parameter: bucket
            for chunk in ddp_chunks
            for buffer in chunk.buffers
            for bucket in buffer.buckets
            for parameter in bucket.params
        }

        # This rank's slices of the model's own weights and gradients, beside each partition.
        self._slices: list[tuple[Tensor, Tensor]] = []
        partitions = []
        group = mesh.replica_group()
        for name, parameter in named.items():
            sizes = _numel_per_rank(parameter, buckets[parameter].param_data, layout.num_replicas)
            first = sum(sizes[: layout.replica_rank])
            local = slice(first, first + sizes[layout.replica_rank])
            if local.start < local.stop:
                weight = parameter.detach().view(-1)[local]
                self._slices.append((weight, parameter.main_grad.view(-1)[local]))
                param_range = ParamRange(name, parameter.shape, [slice(0, n) for n in sizes])
                partitions.append(
                    Partition(weight.float(), [param_range], weight.dtype, group, max(sizes))
                )
        super().__init__(partitions)

    @override
    def reduce_grads(self) -> None:
        for partition, (_, grad) in zip(self.partitions, self._slices, strict=True):
            partition.flat.grad = grad.float()

    @override
    def grad_norm_squared(self) -> Tensor:
        grads = [(p.name, p.flat.grad) for p in self.partitions if p.flat.grad is not None]
        return mesh.all_reduce_sum(local_grad_norm_squared(grads, self._layout))

    @override
    @torch.no_grad()
    def sync_model_weights(self) -> None:
        for partition, (weight, _) in zip(self.partitions, self._slices, strict=True):
            if partition.weight_dtype != torch.float32:
                weight.copy_(partition.flat)
        for chunk in self._ddp_chunks:
            chunk.start_param_sync()


def _numel_per_rank(parameter: Tensor, bucket: Tensor, num_ranks: int) -> list[int]:
    """Elements of a parameter in the equal slices of its bucket, of which each rank has one."""
    offset = parameter.storage_offset() - bucket.storage_offset()
    row_numel = bucket.numel() // num_ranks
    contiguous = ParamRange.contiguous("", parameter.shape, offset, num_ranks, row_numel)
    return [part.stop - part.start for part in contiguous.row_slices]
