"""Map parameters to ranges of the flat, sharded fp32 buffers of a head engine.

Each rank holds a flat partition, called a row; the rows of all ranks form a buffer [G, L].

Legend: G ranks, L elements per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.sharded_tensor import ShardedTensor


@dataclass(frozen=True)
class ParamRange:
    """Location of a parameter in a buffer [G, L].

    Without ``shard_numel`` the parameter is contiguous in the flattened buffer, from element
    ``offset`` on (ZeRO 1 and 2). With ``shard_numel`` it is split into G shards of that many
    elements, with padding at the end, and each shard is at ``offset`` of its row (ZeRO 3 and
    FSDP2).
    """

    name: str
    shape: torch.Size
    offset: int
    shard_numel: int | None = None

    def extract_full(self, buffer: Tensor) -> Tensor:
        """Return a copy of the full parameter."""
        if self.shard_numel is None:
            flat = buffer.flatten()[self.offset : self.offset + self.shape.numel()]
        else:
            flat = buffer[:, self.offset : self.offset + self.shard_numel].flatten()[
                : self.shape.numel()
            ]

        return flat.view(self.shape).clone()

    def insert_full(self, buffer: Tensor, full: Tensor) -> None:
        """Write the full parameter into the buffer."""
        flat = full.flatten()

        if self.shard_numel is None:
            buffer.view(-1)[self.offset : self.offset + len(flat)] = flat
        else:
            padded = F.pad(flat, (0, self.shard_numel * len(buffer) - len(flat)))
            buffer[:, self.offset : self.offset + self.shard_numel] = padded.view(len(buffer), -1)


@dataclass(frozen=True)
class Partition:
    """This rank's row of a buffer [G, L], in fp32, and the parameters in the buffer.

    Args:
        flat: the row, as a tensor of any shape.
        param_ranges: locations of the parameters.
        group: the ranks whose rows form the buffer; None: this row is the full buffer.
        padded_numel: L, to which ``flat`` is padded if it is shorter than other ranks' rows.
    """

    flat: Tensor
    param_ranges: Sequence[ParamRange]
    group: dist.ProcessGroup | None
    padded_numel: int

    @property
    def group_rank(self) -> int:
        """Index of this rank's row."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def group_size(self) -> int:
        """Number of rows, G."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def gather(self, local: Tensor) -> Tensor:
        """Gather a buffer. Collective.

        Args:
            local: this rank's row, laid out like ``flat``.

        Returns:
            The buffer [G, L] on this rank's device, even if ``local`` is in host memory.
        """
        local = F.pad(local.detach().flatten(), (0, self.padded_numel - local.numel())).to(
            mesh.device()
        )
        if self.group is None:
            return local.unsqueeze(0)

        buffer = local.new_empty(self.group_size, self.padded_numel)
        dist.all_gather(list(buffer.unbind()), local, group=self.group)
        return buffer

    def reduce_to_local(self, buffer: Tensor) -> Tensor:
        """Sum the full buffers [G, L] of all ranks, in place. Collective.

        Returns:
            This rank's row of the sum, laid out like ``flat``.
        """
        if self.group is not None:
            dist.all_reduce(buffer, group=self.group)
        return self._local(buffer).to(self.flat.device)

    def _local(self, buffer: Tensor) -> Tensor:
        """This rank's row of a buffer, without padding."""
        return buffer[self.group_rank, : self.flat.numel()].view_as(self.flat)

    def to_sharded_tensor(self, param_range: ParamRange, local: Tensor) -> ShardedTensor:
        """This rank's shard of a parameter.

        Args:
            param_range: location of the parameter.
            local: this rank's row, laid out like ``flat``; the shard is a view of it.
        """
        local = local.detach().view(-1)
        numel = param_range.shape.numel()

        if param_range.shard_numel is None:
            # intersect the parameter with this row, both as ranges of the flattened buffer
            local_start = self.group_rank * self.padded_numel
            first = max(param_range.offset, local_start)
            last = min(param_range.offset + numel, local_start + self.padded_numel)
            return ShardedTensor.from_flat_range(
                param_range.shape,
                first - param_range.offset,
                local[first - local_start : max(first, last) - local_start],
            )

        # the last shards may be padding, in part or in full
        first = self.group_rank * param_range.shard_numel
        count = max(0, min(param_range.shard_numel, numel - first))
        return ShardedTensor.from_flat_range(
            param_range.shape, first, local[param_range.offset : param_range.offset + count]
        )
