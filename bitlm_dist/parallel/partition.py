"""Partitions: a rank's flat fp32 shard of the weights, the parameters in it, its optimizer state.

The ranks of a group each hold a partition, called a row; the rows of all ranks form a buffer
[G, L].

Legend: G ranks of the group, L elements per row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.sharded_tensor import ShardedTensor


@dataclass(frozen=True)
class ParamRange:
    """Location of a parameter in a buffer [G, L].

    Args:
        name: the parameter's global name.
        shape: its shape.
        row_slices: the elements of each rank's row that belong to it; they are consecutive ranges
            of the flattened parameter, in the order of ranks.
    """

    name: str
    shape: torch.Size
    row_slices: Sequence[slice]

    @classmethod
    def contiguous(
        cls, name: str, shape: torch.Size, offset: int, num_rows: int, row_numel: int
    ) -> "ParamRange":
        """A parameter that starts at element ``offset`` of the flattened buffer."""
        starts = [offset - rank * row_numel for rank in range(num_rows)]
        ends = [start + shape.numel() for start in starts]
        clipped = ([min(max(0, x), row_numel) for x in bounds] for bounds in (starts, ends))
        return cls(name, shape, [slice(*bounds) for bounds in zip(*clipped, strict=True)])

    @classmethod
    def split(
        cls, name: str, shape: torch.Size, offset: int, num_rows: int, shard_numel: int
    ) -> "ParamRange":
        """A parameter of which every row holds ``shard_numel`` elements from ``offset`` on.

        The last shards may be padding, in part or in full.
        """
        shards = cls.contiguous(name, shape, 0, num_rows, shard_numel).row_slices
        return cls(name, shape, [slice(offset, offset + part.stop) for part in shards])

    @property
    def numel_per_row(self) -> list[int]:
        """Elements of the parameter in every row."""
        return [part.stop - part.start for part in self.row_slices]

    def extract_full(self, buffer: Tensor) -> Tensor:
        """Return a copy of the full parameter."""
        parts = [row[part] for row, part in zip(buffer, self.row_slices, strict=True)]
        return torch.cat(parts).view(self.shape)

    def insert_full(self, buffer: Tensor, full: Tensor) -> None:
        """Write the full parameter into the buffer."""
        values = full.flatten().split(self.numel_per_row)
        for row, part, value in zip(buffer, self.row_slices, values, strict=True):
            row[part] = value

    def to_sharded_tensor(self, row: Tensor, rank: int) -> ShardedTensor:
        """Wrap a rank's shard of the parameter, a view of its row."""
        first = sum(self.numel_per_row[:rank])
        return ShardedTensor.from_flat_range(self.shape, first, row[self.row_slices[rank]])


@dataclass(eq=False)
class Partition:
    """This rank's row of a buffer [G, L], in fp32, and the parameters in the buffer.

    Args:
        flat: the row, as a tensor of any shape; its gradient is ``flat.grad``.
        param_ranges: locations of the parameters.
        weight_dtype: dtype of the model's own weights; if it is not fp32, ``flat`` is their master.
        group: the ranks whose rows form the buffer; None: this row is the full buffer.
        padded_numel: L, to which ``flat`` is padded if it is shorter than other ranks' rows;
            default: its size.
        state: the optimizer's tensors by slot: laid out like ``flat``, or scalars.
    """

    flat: Tensor
    param_ranges: Sequence[ParamRange]
    weight_dtype: torch.dtype = torch.float32
    group: dist.ProcessGroup | None = None
    padded_numel: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.padded_numel = self.padded_numel or self.flat.numel()
        self.group_rank = 0 if self.group is None else dist.get_rank(self.group)
        self.group_size = 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def grad(self) -> Tensor:
        """The gradient, which must exist."""
        assert self.flat.grad is not None
        return self.flat.grad

    @property
    def name(self) -> str:
        """Name of the first parameter, which no other partition has."""
        return self.param_ranges[0].name

    def to_sharded_tensors(self, local: Tensor) -> dict[str, ShardedTensor]:
        """This rank's shard of every parameter, by name; views of ``local``.

        Args:
            local: laid out like ``flat``, or a scalar that holds for every parameter.
        """
        if local.shape != self.flat.shape:
            assert not local.dim(), f"{self.name}: {tuple(local.shape)} is laid out unlike its rows"
            return {p.name: ShardedTensor.from_full(local) for p in self.param_ranges}
        row = local.detach().view(-1)
        return {p.name: p.to_sharded_tensor(row, self.group_rank) for p in self.param_ranges}

    def full_tensors(self) -> dict[str, Tensor]:
        """Copies of the full parameters by name. Collective."""
        buffer = _gather([self], [self.flat])
        return {p.name: p.extract_full(buffer) for p in self.param_ranges}


def assign_owners(numel_by_name: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """The rank, out of ``num_ranks``, that gets each tensor.

    The largest tensors are assigned first, each to the rank with the fewest elements so far.
    """
    numel_per_rank = [0] * num_ranks
    owners = {}
    # Ties are broken by name, as all ranks must arrive at the same assignment.
    for name, numel in sorted(numel_by_name.items(), key=lambda item: (-item[1], item[0])):
        owners[name] = numel_per_rank.index(min(numel_per_rank))
        numel_per_rank[owners[name]] += numel
    return owners


def map_full_tensors(
    partitions: Sequence[Partition],
    local_tensors: Sequence[Tensor],
    function: Callable[[list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """Apply a function to full tensors; of sharded ones, each rank takes some. Collective.

    Args:
        partitions: what ``local_tensors`` are laid out like; one group shards all that are sharded.
        local_tensors: this rank's shards of the tensors.
        function: maps full tensors to tensors of the same shapes.

    Returns:
        This rank's shards of the results.
    """
    results = list(local_tensors)
    full = [i for i, partition in enumerate(partitions) if partition.group is None]
    for i, result in zip(full, function([results[i] for i in full]), strict=True):
        results[i] = result

    sharded = [i for i, partition in enumerate(partitions) if partition.group is not None]
    if not sharded:
        return results

    members = [partitions[i] for i in sharded]
    buffer = _gather(members, [results[i] for i in sharded])
    tables = buffer.split([partition.padded_numel for partition in members], dim=1)
    located = [
        (param_range, table)
        for partition, table in zip(members, tables, strict=True)
        for param_range in partition.param_ranges
    ]
    owners = assign_owners({p.name: p.shape.numel() for p, _ in located}, members[0].group_size)
    owned = [(p, table) for p, table in located if owners[p.name] == members[0].group_rank]
    mapped = function([p.extract_full(table) for p, table in owned])

    # What other ranks own stays zero here, so that the sum over ranks collects all results.
    buffer.zero_()
    for (param_range, table), result in zip(owned, mapped, strict=True):
        param_range.insert_full(table, result)
    dist.all_reduce(buffer, group=members[0].group)

    for i, partition, table in zip(sharded, members, tables, strict=True):
        flat = partition.flat
        results[i] = table[partition.group_rank, : flat.numel()].view_as(flat).to(flat.device)
    return results


def _gather(partitions: Sequence[Partition], local_tensors: Sequence[Tensor]) -> Tensor:
    """Gather the buffers of partitions with one group, side by side. Collective.

    Returns:
        [G, sum of L] on this rank's device, even if the partitions are in host memory.
    """
    parts = []
    for partition, local in zip(partitions, local_tensors, strict=True):
        padding = local.new_zeros(partition.padded_numel - local.numel())
        parts += [local.detach().flatten(), padding]

    row = torch.cat(parts).to(mesh.device())
    group = partitions[0].group
    if group is None:
        return row.unsqueeze(0)

    buffer = row.new_empty(partitions[0].group_size, len(row))
    dist.all_gather(list(buffer.unbind()), row, group=group)
    return buffer
