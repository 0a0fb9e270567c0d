"""Inside a token: each group of bits after the group before it.

A mixture lets the groups of a token know each other through R components only. With tables, group j's logits get the product of the
state with output rows chosen by the pattern of group j - 1: a softmax over the vocabulary in levels of 2^g classes, at the cost of
2^g rows a level whatever the vocabulary.

Legend: N blocks, M tokens a block, D width of the state, R mixture components, G groups, P patterns a group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.diffusion.outputs import MixtureOutput
from bitlm_dist.kernels import grouped_matmul


class GroupTables(nn.Module):
    """Zero at the start: no correction.

    Args:
        output: the mixture that is corrected.
        width: D.
    """

    def __init__(self, output: MixtureOutput, width: int) -> None:
        super().__init__()
        patterns = 2**output.group
        self.output = output
        self.rows = nn.Parameter(torch.zeros((output.groups - 1) * patterns, patterns, width))  # [(G - 1)·P, P, D]

    def after(self, state: Tensor, j: int, before: Tensor) -> Tensor:
        """What group ``j`` adds to its logits: state [..., D], patterns ``before`` [...] of group j - 1 -> [..., P]."""
        flat = grouped_matmul(
            state.reshape(-1, state.shape[-1]), before.flatten(), self.rows.unflatten(0, (-1, self.rows.shape[1]))[j - 1]
        )
        return flat.view(*before.shape, -1)

    def forward(self, raw: Tensor, state: Tensor, clean: Tensor) -> Tensor:
        """Raw output [..., size] of tokens ``clean`` [..., K] -> the same given their bits; ``state`` broadcasts to [..., D]."""
        output, index = self.output, self.output.index(clean)
        state = state.expand(*index.shape[:-1], -1)
        parts = [self.after(state, j, index[..., j - 1]) for j in range(1, output.groups)]
        added = F.pad(torch.stack(parts, -2), (0, 0, 1, 0))  # nothing to the first group
        logits = raw[..., output.components :].unflatten(-1, (output.components, *added.shape[-2:]))
        return torch.cat((raw[..., : output.components], (logits + added.unsqueeze(-3)).flatten(-3)), -1)
