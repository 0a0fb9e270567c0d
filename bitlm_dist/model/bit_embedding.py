"""Bits instead of an embedding table: a position-wise MLP B -> d -> d on the codes (paper, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLACE_STD = 0.1


class BitEmbedding(nn.Module):
    """Clean bits [B, S, K] in {-1, +1} -> vectors [B, S, D].

    With ``block`` a learned table of that many rows tells each token its place in its block. Rotary positions carry only
    differences, and what the next block needs, such as "attend to the last token of my block", is another one at every place.
    """

    def __init__(self, bits: int, width: int, block: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(bits, width)
        self.down = nn.Linear(width, width)
        self.places = nn.Parameter(torch.randn(block, width) * PLACE_STD) if block else None

    def forward(self, bits: Tensor) -> Tensor:
        """bits [B, S, K], S whole blocks -> [B, S, D]."""
        embedded: Tensor = self.down(F.gelu(self.up(bits)))
        if self.places is None:
            return embedded
        return (embedded.unflatten(1, (-1, len(self.places))) + self.places).flatten(1, 2)
