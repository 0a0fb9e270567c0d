"""Bits instead of an embedding table: a position-wise MLP B -> d -> d on the codes (paper, section 3.2), and windows of bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.kernels.few_rows import Linear

WINDOW_STRIDE = 2  # bits from one window to the next


def token_table(rows: int, width: int) -> nn.Embedding:
    """An embedding table, drawn with a standard deviation of 0.02."""
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=0.02)
    return table


class BitEmbedding(nn.Module):
    """Clean bits [B, S, K] in {-1, +1} -> vectors [B, S, D].

    An MLP on B numbers is smooth in the code, so it is slow to tell apart tokens whose codes are close. With ``window`` = w > 0 the
    vectors of all windows of w consecutive bits are added, each looked up in a table of 2^w rows: about B/2 small tables, whatever
    the size of the vocabulary.

    Args:
        bits: K.
        width: D.
        window: w, cut to K; 0: the MLP alone, as in the paper.
    """

    windows: Tensor  # [n, w], the places of each window's bits
    weights: Tensor  # [w], powers of two
    offsets: Tensor  # [n], where each window's rows begin

    def __init__(self, bits: int, width: int, window: int = 0) -> None:
        super().__init__()
        window = min(window, bits)
        self.up = Linear(bits, width)
        self.down = Linear(width, width)
        last = bits - window
        starts = torch.tensor(sorted({*range(0, last, WINDOW_STRIDE), last}))
        tables = [token_table(2**window, width).weight for _ in starts] if window else []
        self.table = nn.Parameter(torch.cat(tables).detach()) if window else None  # one below the other
        self.register_buffer("windows", starts[:, None] + torch.arange(window), persistent=False)
        self.register_buffer("weights", 2 ** torch.arange(window), persistent=False)
        self.register_buffer("offsets", 2**window * torch.arange(len(starts)), persistent=False)

    def forward(self, bits: Tensor) -> Tensor:
        """bits [B, S, K] -> [B, S, D]; the windows read signs."""
        out: Tensor = self.down(F.gelu(self.up(bits)))
        if self.table is None:
            return out
        rows = ((bits > 0)[..., self.windows] * self.weights).sum(-1) + self.offsets
        return out + F.embedding_bag(rows.flatten(0, -2), self.table, mode="sum").view(out.shape)
