"""Parameters that are sharded over the tensor-parallel ranks, and then perhaps over replicas."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from bitlm_dist.model.initialization import shard, unshard
from bitlm_dist.parallel.partition import ParamRange
from bitlm_dist.parallel.sharded_tensor import ShardedTensor


@dataclass(frozen=True)
class TensorParallelRange(ParamRange):
    """A parameter of which every row is a range of a tensor-parallel rank's shard.

    The tensor-parallel rank varies fastest over the rows.
    """

    local_shape: torch.Size  # of a tensor-parallel rank's shard
    num_tensor_ranks: int

    @classmethod
    def of_shard(
        cls, name: str, local_shape: torch.Size, num_tensor_ranks: int, numels: Sequence[int]
    ) -> "TensorParallelRange":
        """A parameter whose shards are split into consecutive ranges, each a row of its own.

        Args:
            name: the parameter's global name.
            local_shape: shape of a tensor-parallel rank's shard.
            num_tensor_ranks: number of shards.
            numels: elements of every range of a shard.
        """
        local = torch.empty(local_shape, device="meta")
        full_shape = unshard(name, [local] * num_tensor_ranks).shape
        rows = [slice(0, numel) for numel in numels for _ in range(num_tensor_ranks)]
        return cls(name, full_shape, rows, local_shape, num_tensor_ranks)

    @override
    def join_shards(self, shards: Sequence[Tensor]) -> Tensor:
        num = self.num_tensor_ranks
        ranges = [shards[rank::num] for rank in range(num)]
        local = [torch.cat([*x]) if len(x) > 1 else x[0] for x in ranges]
        return unshard(self.name, [x.view(self.local_shape) for x in local])

    @override
    def split_full(self, full: Tensor) -> Sequence[Tensor]:
        num = self.num_tensor_ranks
        local = [shard(self.name, full, rank, num).flatten() for rank in range(num)]
        ranges = [x.split(self.numel_per_row[::num]) for x in local]
        return [part for parts in zip(*ranges, strict=True) for part in parts]

    @override
    def to_sharded_tensor(self, row: Tensor, rank: int) -> ShardedTensor:
        # Checkpoints turn the shards of all weights into those of full tensors in one place.
        num = self.num_tensor_ranks
        first = sum(self.numel_per_row[: rank // num * num : num])
        return ShardedTensor.from_flat_range(self.local_shape, first, row[self.row_slices[rank]])
