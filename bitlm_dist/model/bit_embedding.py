"""Bits instead of an embedding table: a position-wise MLP B -> d -> d on the codes (paper, section 3.2), and windows of bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    places: Tensor  # [w] powers of two

    def __init__(self, bits: int, width: int, window: int = 0) -> None:
        super().__init__()
        self.up = nn.Linear(bits, width)
        self.down = nn.Linear(width, width)
        window = min(window, bits)
        last = bits - window
        self.starts = sorted({*range(0, last, WINDOW_STRIDE), last}) if window else []
        self.tables = nn.ModuleList(token_table(2**window, width) for _ in self.starts)
        self.register_buffer("places", 2 ** torch.arange(window), persistent=False)

    def forward(self, bits: Tensor) -> Tensor:
        """bits [B, S, K] -> [B, S, D]; the windows read signs."""
        out: Tensor = self.down(F.gelu(self.up(bits)))
        on = (bits > 0).long()
        for start, table in zip(self.starts, self.tables, strict=True):
            out = out + table((on[..., start : start + len(self.places)] * self.places).sum(-1))
        return out
