"""A table with one row per token, sharded over the tensor ranks: the softmax's two tables.

Legend: V vocabulary, T tensor ranks, P rows per rank, D hidden size.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from bitlm_dist.kernels.skinny_linear import linear
from bitlm_dist.model.initialization import INIT_STD, normal, random_parameter
from bitlm_dist.parallel.layout import ParallelLayout

# V is padded to a multiple of this, so that the full table has the same shape on every layout.
VOCAB_DIVISIBLE_BY = 128


class VocabParallelTable(nn.Module):
    """The rows of one tensor rank, P = ceil(V / 128)·128 / T.

    Rows beyond V are padding and are never read.

    Args:
        vocab_size: V.
        hidden_size: D.
        layout: its tensor ranks share the table; T must divide 128.
    """

    def __init__(self, vocab_size: int, hidden_size: int, layout: ParallelLayout) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self._layout = layout
        num_local_rows = -(-vocab_size // VOCAB_DIVISIBLE_BY) * VOCAB_DIVISIBLE_BY // layout.tensor
        self._vocab_start = layout.tensor_rank * num_local_rows
        self._num_used_rows = min(max(vocab_size - self._vocab_start, 0), num_local_rows)

        self.rows = random_parameter(num_local_rows, hidden_size, distribution=normal(INIT_STD))

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Look up the rows [..., D] of tokens [...].

        The rows of other ranks are zero, so the sum over the tensor ranks is complete.
        """
        if self._layout.tensor == 1:
            return F.embedding(tokens, self.rows)

        local_row = tokens - self._vocab_start
        is_local = (local_row >= 0) & (local_row < len(self.rows))
        return F.embedding(local_row.masked_fill(~is_local, 0), self.rows) * is_local.unsqueeze(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Products of hidden states [..., D] with this rank's rows.

        Returns:
            [..., P], -inf at padding rows; [..., V] if T = 1.
        """
        used_logits = linear(hidden, self.rows[: self._num_used_rows])
        return (
            used_logits
            if self._layout.tensor == 1
            else F.pad(used_logits, (0, len(self.rows) - self._num_used_rows), value=-math.inf)
        )
