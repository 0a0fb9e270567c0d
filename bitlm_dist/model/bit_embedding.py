"""Bits instead of an embedding table: a position-wise MLP B -> d -> d on the codes (paper, section 3.2)."""

import torch.nn.functional as F
from torch import Tensor, nn


class BitEmbedding(nn.Module):
    """Clean bits [B, S, K] in {-1, +1} -> vectors [B, S, D]."""

    def __init__(self, bits: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(bits, width)
        self.down = nn.Linear(width, width)

    def forward(self, bits: Tensor) -> Tensor:
        """bits [B, S, K] -> [B, S, D]."""
        return self.down(F.gelu(self.up(bits)))
