"""One row a token, split over the tensor ranks: the softmax's embedding table and its output matrix.

Legend: V vocabulary, T tensor ranks, P rows of a rank, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.kernels.few_rows import linear
from bitlm_dist.model.initialization import STD, drawn_from
from bitlm_dist.parallel.layout import Layout

MULTIPLE = 128  # to which V is padded, so that the whole table has one shape on every layout


class VocabularyTable(nn.Module):
    """The rows of a tensor rank, P = ceil(V / 128)·128 / T; those beyond V belong to no token and are never read.

    Args:
        vocabulary: V.
        width: D.
        layout: its tensor ranks share the table; T divides 128.
        seed: of the weights; with ``name`` it draws the whole table, whatever the layout.
    """

    def __init__(self, vocabulary: int, width: int, layout: Layout, seed: int, name: str) -> None:
        super().__init__()
        self.vocabulary, self._layout = vocabulary, layout
        share = -(-vocabulary // MULTIPLE) * MULTIPLE // layout.tensor
        self._first = layout.tensor_rank * share
        self._used = min(max(vocabulary - self._first, 0), share)
        with drawn_from(seed, name):
            whole = torch.empty(share * layout.tensor, width).normal_(std=STD)
        self.rows = nn.Parameter(whole[self._first : self._first + share].clone())

    def look_up(self, tokens: Tensor) -> Tensor:
        """tokens [...] -> their rows [..., D]; zeros for rows of other ranks, so that the sum over the ranks has them all."""
        if self._layout.tensor == 1:
            return F.embedding(tokens, self.rows)
        place = tokens - self._first
        mine = (place >= 0) & (place < len(self.rows))
        return F.embedding(place.masked_fill(~mine, 0), self.rows) * mine.unsqueeze(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> [..., P]: products with this rank's rows, -inf for those of no token; with T = 1 [..., V]."""
        used = linear(hidden, self.rows[: self._used])
        return used if self._layout.tensor == 1 else F.pad(used, (0, len(self.rows) - self._used), value=-math.inf)
