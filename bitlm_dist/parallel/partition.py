"""Partitions: a rank's flat fp32 shard of the weights, the parameters in it, its optimizer state.

The ranks of a group each hold a partition, called a row; the rows of all ranks form a buffer
[G, L].

Legend: G ranks of the group, L elements per row.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.sharded_tensor import ShardedTensor

# Elements of full tensors that an owner maps at once: 256 MiB in bf16, 512 MiB in fp32. One tensor
# more may begin in a round, as tensors are not split.
ROUND_NUMEL = 2**27


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

    def numel_in_row(self, rank: int) -> int:
        """Elements of the parameter in a rank's row."""
        part = self.row_slices[rank]
        return part.stop - part.start

    @property
    def numel_per_row(self) -> list[int]:
        """Elements of the parameter in every row."""
        return [part.stop - part.start for part in self.row_slices]

    def join_shards(self, shards: Sequence[Tensor]) -> Tensor:
        """Assemble a copy of the full parameter from every rank's shard, flat tensors."""
        return torch.cat([*shards]).view(self.shape)

    def split_full(self, full: Tensor) -> Sequence[Tensor]:
        """Every rank's shard of the full parameter, flat: the inverse of :meth:`join_shards`."""
        return full.flatten().split(self.numel_per_row)

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
        """Copies of the full parameters by name, on this rank's device. Collective."""
        row = self.flat.new_zeros(self.padded_numel)
        row[: self.flat.numel()] = self.flat.detach().flatten()
        row = row.to(mesh.device())

        buffer = row.new_empty(self.group_size * self.padded_numel)
        if self.group is None:
            buffer = row
        else:
            dist.all_gather_into_tensor(buffer, row, group=self.group)
        rows = buffer.view(self.group_size, -1)
        return {
            p.name: p.join_shards([row[part] for row, part in zip(rows, p.row_slices, strict=True)])
            for p in self.param_ranges
        }


def assign_owners(costs: Sequence[int], num_ranks: int) -> list[int]:
    """The rank, out of ``num_ranks``, that gets each item, so that costs are balanced.

    The most expensive items are assigned first, each to the rank with the lowest cost so far.
    """
    loads = [(0, rank) for rank in range(num_ranks)]  # a heap
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, owners[index] = loads[0]
        heapq.heapreplace(loads, (load + costs[index], owners[index]))
    return owners


class LocalShard(NamedTuple):
    """This rank's shard of a parameter, and the rank of the group that maps the full parameter."""

    param_range: ParamRange
    flat: Tensor  # a view of this rank's row
    owner: int = 0


def map_full_tensors(
    partitions: Sequence[Partition],
    local_tensors: Sequence[Tensor],
    function: Callable[[list[Tensor]], list[Tensor]],
    cost: Callable[[torch.Size], int],
    dtype: torch.dtype,
) -> None:
    """Replace tensors by a function of them, which needs them in full. Collective.

    Of tensors that are sharded over a group, each rank maps some. They go to it and come back in
    rounds, so memory is bounded by :data:`ROUND_NUMEL`.

    Args:
        partitions: what ``local_tensors`` are laid out like.
        local_tensors: this rank's shards of the tensors. The results overwrite them.
        function: maps full tensors to tensors of the same shapes and dtype.
        cost: cost of mapping a tensor by its shape; the sum is balanced over the ranks of a group.
        dtype: dtype in which tensors are sent and mapped.
    """
    by_group: dict[dist.ProcessGroup | None, list[LocalShard]] = defaultdict(list)
    for partition, local in zip(partitions, local_tensors, strict=True):
        row = local.detach().view(-1)
        by_group[partition.group] += [
            LocalShard(p, row[p.row_slices[partition.group_rank]]) for p in partition.param_ranges
        ]

    for group, shards in by_group.items():
        num_ranks = 1 if group is None else dist.get_world_size(group)
        owners = assign_owners([cost(shard.param_range.shape) for shard in shards], num_ranks)
        owned = [shard._replace(owner=o) for shard, o in zip(shards, owners, strict=True)]
        for members in _rounds(owned):
            if group is None:
                _map_local(members, function, dtype)
            else:
                _map_round(group, members, function, dtype)


def _rounds(shards: Sequence[LocalShard]) -> Iterator[list[LocalShard]]:
    """Split shards into rounds in which every owner gets about :data:`ROUND_NUMEL` elements.

    The largest tensors come first, so that the owners have tensors of similar sizes at a time.
    """
    numels = [shard.param_range.shape.numel() for shard in shards]
    numel_per_owner: dict[int, int] = defaultdict(int)
    rounds: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(shards)), key=lambda i: (-numels[i], i)):
        owner = shards[index].owner
        rounds[numel_per_owner[owner] // ROUND_NUMEL].append(index)
        numel_per_owner[owner] += numels[index]

    for number in sorted(rounds):
        yield [shards[i] for i in sorted(rounds[number])]


def _map_local(
    shards: Sequence[LocalShard],
    function: Callable[[list[Tensor]], list[Tensor]],
    dtype: torch.dtype,
) -> None:
    """Map tensors that this rank has in full."""
    full = [s.flat.to(mesh.device(), dtype).view(s.param_range.shape) for s in shards]
    for shard, result in zip(shards, function(full), strict=True):
        shard.flat.copy_(result.flatten())


def _map_round(
    group: dist.ProcessGroup,
    shards: Sequence[LocalShard],
    function: Callable[[list[Tensor]], list[Tensor]],
    dtype: torch.dtype,
) -> None:
    """Send shards to their owners, map the full tensors, and take the results back."""
    rank = dist.get_rank(group)
    num_ranks = dist.get_world_size(group)

    # Messages are in the order of ranks, and for one rank in the order of parameters.
    by_owner = sorted(shards, key=lambda shard: shard.owner)
    owned = [shard.param_range for shard in by_owner if shard.owner == rank]
    numel_to_owner = [0] * num_ranks
    for shard in by_owner:
        numel_to_owner[shard.owner] += shard.flat.numel()
    numel_of_owned = [[p.numel_in_row(row) for p in owned] for row in range(num_ranks)]
    numel_from_row = [sum(sizes) for sizes in numel_of_owned]

    local = torch.cat([shard.flat.to(dtype) for shard in by_owner]).to(mesh.device())
    received = _all_to_all(local, numel_to_owner, numel_from_row, group)
    del local

    rows = [
        row.split(sizes)
        for row, sizes in zip(received.split(numel_from_row), numel_of_owned, strict=True)
    ]
    full = [p.join_shards([row[i] for row in rows]) for i, p in enumerate(owned)]
    del rows, received

    mapped = [p.split_full(x) for p, x in zip(owned, function(full), strict=True)]
    del full
    results = [parts[row] for row in range(num_ranks) for parts in mapped]
    sent = torch.cat(results) if results else torch.empty(0, dtype=dtype, device=mesh.device())
    del mapped, results

    # all_to_all needs as many sizes as there are ranks; what it returns may go to the host at once
    back = _all_to_all(sent, numel_from_row, numel_to_owner, group).to(by_owner[0].flat.device)
    for shard, result in zip(
        by_owner, back.split([shard.flat.numel() for shard in by_owner]), strict=True
    ):
        shard.flat.copy_(result)


def _all_to_all(
    x: Tensor, send_numels: list[int], receive_numels: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Exchange consecutive pieces of a flat tensor with all ranks of a group."""
    received = x.new_empty(sum(receive_numels))
    dist.all_to_all_single(received, x, receive_numels, send_numels, group=group)
    return received
