"""Whole tensors in flat partitions: where each lies in the table of all ranks' rows.

Legend: G ranks, L numbers of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.sliced import Sliced


@dataclass(frozen=True)
class Piece:
    """Place of a tensor in a table [G, L]: from number ``offset`` on of the rows laid end to end, or a share of every row.

    In the second case the tensor is cut in G shares of ``share`` numbers, the last one padded, each at ``offset`` of its row.
    """

    name: str
    shape: torch.Size
    offset: int
    share: int | None = None

    def read(self, table: Tensor) -> Tensor:
        """The whole tensor, a copy."""
        if self.share is None:
            flat = table.flatten()[self.offset : self.offset + self.shape.numel()]
        else:
            flat = table[:, self.offset : self.offset + self.share].flatten()[: self.shape.numel()]
        return flat.view(self.shape).clone()

    def write(self, table: Tensor, whole: Tensor) -> None:
        """Put the whole tensor in its place."""
        flat = whole.flatten()
        if self.share is None:
            table.view(-1)[self.offset : self.offset + len(flat)] = flat
        else:
            padded = F.pad(flat, (0, self.share * len(table) - len(flat)))
            table[:, self.offset : self.offset + self.share] = padded.view(len(table), -1)


@dataclass(frozen=True)
class Partition:
    """A rank's row ``flat`` [L] of a table, fp32, and what lies in the table.

    Args:
        flat: of any shape; its numbers are the row.
        pieces: the tensors.
        group: of the ranks whose rows make the table; None: this row is all of it.
        length: L, to which ``flat`` is padded where it is shorter than other ranks'.
    """

    flat: Tensor
    pieces: Sequence[Piece]
    group: dist.ProcessGroup | None
    length: int

    @property
    def rank(self) -> int:
        """Which row is this rank's."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """G."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def table(self, row: Tensor) -> Tensor:
        """Every rank's ``row``, which lies as ``flat`` does -> [G, L], where the group meets; every rank calls it."""
        row = F.pad(row.detach().flatten(), (0, self.length - row.numel())).to(mesh.device())  # ``flat`` may be offloaded
        if self.group is None:
            return row.unsqueeze(0)
        found = row.new_empty(self.ranks, self.length)
        dist.all_gather(list(found.unbind()), row, group=self.group)
        return found

    def added(self, table: Tensor) -> Tensor:
        """The sum of all ranks' tables [G, L] -> this rank's row, as ``flat`` is; every rank calls it."""
        if self.group is not None:
            dist.all_reduce(table, group=self.group)
        return self._own(table).to(self.flat.device)

    def _own(self, table: Tensor) -> Tensor:
        return table[self.rank, : self.flat.numel()].view_as(self.flat)

    def sliced(self, piece: Piece, row: Tensor) -> Sliced:
        """What this rank's ``row``, which lies as ``flat`` does, holds of a tensor."""
        row, size = row.detach().view(-1), piece.shape.numel()
        if piece.share is None:
            begin = self.rank * self.length  # of the row in the table
            first, last = max(piece.offset, begin), min(piece.offset + size, begin + self.length)
            return Sliced.of_range(piece.shape, first - piece.offset, row[first - begin : max(first, last) - begin])
        first = self.rank * piece.share
        count = max(0, min(piece.share, size - first))
        return Sliced.of_range(piece.shape, first, row[piece.offset : piece.offset + count])
