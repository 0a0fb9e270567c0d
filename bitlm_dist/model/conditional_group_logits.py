"""Within a token: condition each group of bits on the group before it.

In a mixture, the groups of a token depend on each other only through R components. With these
tables, the logits of group j also get the product of the state with the output rows that the
pattern of group j - 1 selects. That is a hierarchical softmax over the vocabulary in levels of 2^g
classes, at a cost of 2^g rows per level, independent of the vocabulary size.

Legend: N blocks, M tokens per block, D dimension of the state, R mixture components, G groups,
P patterns per group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.diffusion.outputs import MixtureOutput
from bitlm_dist.kernels import grouped_matmul


class ConditionalGroupLogits(nn.Module):
    """Correction of the group logits given the previous group; zero at initialization.

    Args:
        output: the mixture to correct.
        hidden_size: D.
    """

    def __init__(self, output: MixtureOutput, hidden_size: int) -> None:
        super().__init__()
        patterns = 2**output.bits_per_group
        self.output = output
        self.rows: nn.Parameter | None = None  # [(G - 1)·P, P, D]; a single group has none before
        if output.num_groups > 1:
            self.rows = nn.Parameter(
                torch.zeros((output.num_groups - 1) * patterns, patterns, hidden_size)
            )

    def logits_given_previous(
        self, hidden: Tensor, group_index: int, previous_patterns: Tensor
    ) -> Tensor:
        """Correction of one group's logits.

        Args:
            hidden: [..., D].
            group_index: the group to correct, at least 1.
            previous_patterns: [...] pattern index of the group before it.

        Returns:
            [..., P].
        """
        assert self.rows is not None
        flat = grouped_matmul(
            hidden.reshape(-1, hidden.shape[-1]),
            previous_patterns.flatten(),
            self.rows.unflatten(0, (-1, self.rows.shape[1]))[group_index - 1],
        )
        return flat.view(*previous_patterns.shape, -1)

    def forward(self, logits: Tensor, hidden: Tensor, clean: Tensor) -> Tensor:
        """Correct the raw output of tokens whose bits are known.

        Args:
            logits: [..., num_logits].
            hidden: states that broadcast to [..., D].
            clean: bits [..., K] of the tokens.

        Returns:
            [..., num_logits].
        """
        if self.rows is None:
            return logits

        output = self.output
        pattern_index = self.output.pattern_index(clean)
        hidden = hidden.expand(*pattern_index.shape[:-1], -1)

        corrections = [
            self.logits_given_previous(hidden, j, pattern_index[..., j - 1])
            for j in range(1, output.num_groups)
        ]
        # the first group has no predecessor: pad with a correction of zero
        correction = F.pad(torch.stack(corrections, -2), (0, 0, 1, 0))

        # Every mixture component gets the same correction.
        pattern_logits = logits[..., output.num_components :].unflatten(
            -1, (output.num_components, *correction.shape[-2:])
        )
        corrected = (pattern_logits + correction.unsqueeze(-3)).flatten(-3)
        return torch.cat((logits[..., : output.num_components], corrected), -1)
