"""What every model of this project shares: batches in, a causal backbone, the blocks that carry loss (paper, section 3).

Legend: B batch, S sequence, N blocks a sequence, M tokens a block, K bits, D width, V valid target blocks of a batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitlm_dist.config import Config
from bitlm_dist.model.backbone import Backbone
from bitlm_dist.model.initialization import initialize_layers


@dataclass(frozen=True)
class Batch:
    """Packed sequences, see :mod:`bitlm_dist.data.packing`."""

    tokens: Tensor  # [B, S] int64
    document_ids: Tensor  # [B, S] int64, -1 where the sequence is padding
    sample: Tensor  # [B] int64, global index of each sequence

    def part(self, rows: slice) -> "Batch":
        """Some of the sequences: a microbatch."""
        return Batch(self.tokens[rows], self.document_ids[rows], self.sample[rows])


@dataclass(frozen=True)
class Targets:
    """The blocks of a batch that carry loss, in row order."""

    context: Tensor  # [V, M, D] hidden states of the block before
    tokens: Tensor  # [V, M]
    valid: Tensor  # [V, M] bool: False after a document's first EOS
    sample: Tensor  # [V]
    block: Tensor  # [V] index of the target block in its sequence


def target_mask(batch: Batch, block_size: int, eos: int) -> Tensor:
    """Which tokens carry loss: [B, S] bool.

    A block is a target if the block before it belongs to the same document, so a document's BOS block is input only; EOS padding
    after the first EOS carries none (method, section 3).
    """
    blocks = batch.document_ids.unflatten(1, (-1, block_size))
    follows = torch.zeros_like(blocks, dtype=torch.bool)
    follows[:, 1:] = (blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] >= 0)
    is_eos = (batch.tokens == eos).unflatten(1, (-1, block_size))
    before = is_eos.cumsum(-1) - is_eos.long()
    return (follows & (before == 0)).flatten(1)


class LanguageModel(nn.Module, ABC):
    """The whole model of one pipeline stage that is both first and last.

    Args:
        config: checked.
        embedding: what turns tokens, or their bits, into the backbone's input.
        eos: id that ends a document.
    """

    def __init__(self, config: Config, embedding: nn.Module, eos: int) -> None:
        super().__init__()
        self.config, self.eos = config, eos
        self.block_size = config.model.block_size
        self.embedding = embedding
        self.backbone = Backbone(config.model)
        initialize_layers(self.backbone, config.model.backbone.layers, config.training.seed)

    @abstractmethod
    def hidden(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """tokens [B, S] -> C [B, S, D]."""

    @abstractmethod
    def loss(self, batch: Batch, *, seed: int, step: int) -> Tensor:
        """Sum of the loss over the batch's valid tokens; divide by the global count of valid tokens."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The model's parts by the name that reports give them."""

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While open, :meth:`hidden` continues the tokens of the calls before, and no weight may change."""
        with self.backbone.decoding():
            yield

    def targets(self, batch: Batch, hidden: Tensor) -> Targets:
        """Pick the blocks that carry loss, each with the states of the block before it (one-block shift)."""
        m = self.block_size
        valid = target_mask(batch, m, self.eos).unflatten(1, (-1, m))
        row, block = valid.any(-1).nonzero(as_tuple=True)
        return Targets(
            context=hidden.unflatten(1, (-1, m))[row, block - 1],
            tokens=batch.tokens.unflatten(1, (-1, m))[row, block],
            valid=valid[row, block],
            sample=batch.sample[row],
            block=block,
        )
