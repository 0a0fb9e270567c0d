"""Bit embedding: an MLP K -> D -> D on each code, plus bit windows (paper, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.model.initialization import INIT_STD, Linear, normal, random_parameter

WINDOW_STRIDE = 2  # bits between the starts of two windows


class BitEmbedding(nn.Module):
    """Embeds clean bits [B, S, K] in {-1, +1} as vectors [B, S, D].

    An MLP on K inputs is smooth in the code, so it is slow to separate tokens with similar codes.
    With ``window_size`` = w > 0, every window of w consecutive bits looks up a row in its own table
    of 2^w rows, and the rows are added to the MLP's output. That makes about K/2 small tables,
    independent of the vocabulary size.

    Args:
        num_bits: K.
        embedding_dim: D.
        window_size: w, capped at K; 0: the MLP alone, as in the paper.
    """

    window_bits: Tensor  # [n, w], bit positions of each window
    bit_weights: Tensor  # [w], powers of two
    row_offsets: Tensor  # [n], first row of each window in the table

    def __init__(self, num_bits: int, embedding_dim: int, window_size: int = 0) -> None:
        super().__init__()
        window_size = min(window_size, num_bits)
        self.up = Linear(num_bits, embedding_dim)
        self.down = Linear(embedding_dim, embedding_dim)

        # The last window is moved back to end at the last bit, so that every bit is covered.
        last_start = num_bits - window_size
        starts = torch.tensor(sorted({*range(0, last_start, WINDOW_STRIDE), last_start}))

        # One parameter holds all tables, stacked along the rows: a single lookup reads them all.
        self.table = None
        if window_size:
            num_rows = len(starts) * 2**window_size
            self.table = random_parameter(num_rows, embedding_dim, distribution=normal(INIT_STD))

        self.register_buffer(
            "window_bits", starts[:, None] + torch.arange(window_size), persistent=False
        )
        self.register_buffer("bit_weights", 2 ** torch.arange(window_size), persistent=False)
        self.register_buffer(
            "row_offsets", 2**window_size * torch.arange(len(starts)), persistent=False
        )

    def forward(self, bits: Tensor) -> Tensor:
        """Embed bits [B, S, K] as [B, S, D]; the windows read only the signs."""
        out: Tensor = self.down(F.gelu(self.up(bits)))
        if self.table is None:
            return out

        rows = ((bits > 0)[..., self.window_bits] * self.bit_weights).sum(-1) + self.row_offsets
        return out + F.embedding_bag(rows.flatten(0, -2), self.table, mode="sum").view(out.shape)
