"""Batches of packed sequences, and which of their blocks and states carry loss.

Legend: B sequences, S tokens per sequence, N blocks per sequence, M tokens per block, C target
blocks of a microbatch, T states of a microbatch whose next token carries loss, R samples of a
teacher per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitlm_dist.parallel.device import copy_to_device

CAPACITY_MULTIPLE = 64  # blocks; products with a multiple of rows use a GPU's tiles fully


class TargetIndex(NamedTuple):
    """Where the loss of a microbatch is on one rank: indices into its states and into the text.

    With a capacity, all shapes are fixed: what follows the real entries is padding, which repeats
    them and is not valid.
    """

    context_blocks: Tensor  # [C] int64, blocks of the rank's states: contexts of the targets
    target_blocks: Tensor  # [C] int64, the targets among the B·N blocks of the text
    valid: Tensor  # [C, M] bool, False after a document's first EOS
    states: Tensor  # [T] int64, the rank's states whose next token carries loss
    next_positions: Tensor  # [T] int64, that token among the B·S of the text
    next_valid: Tensor  # [T] bool

    def map(self, change: Callable[[Tensor], Tensor]) -> "TargetIndex":
        """Change every tensor."""
        return TargetIndex(*map(change, self))


@dataclass(frozen=True)
class Batch:
    """Packed sequences, see :mod:`bitlm_dist.data.packing`."""

    tokens: Tensor  # [B, S] int64
    document_ids: Tensor  # [B, S] int64, -1 where the sequence is padding
    sequence_index: Tensor  # [B] int64, global index of each sequence
    teacher_tokens: Tensor | None = None  # [R, B, S] int64, a teacher's samples at each position
    # Of a microbatch. Of a step's batch: those of its microbatches, stacked. None: found when used.
    targets: TargetIndex | None = None

    def to(self, device: torch.device) -> "Batch":
        """Move to a device, see :func:`copy_to_device`."""
        move = partial(copy_to_device, device=device)
        return Batch(
            move(self.tokens),
            move(self.document_ids),
            move(self.sequence_index),
            None if self.teacher_tokens is None else move(self.teacher_tokens),
            None if self.targets is None else self.targets.map(move),
        )

    def select(self, rows: slice) -> "Batch":
        """Select sequences; their targets are left out."""
        teacher_tokens = None if self.teacher_tokens is None else self.teacher_tokens[:, rows]
        return Batch(
            self.tokens[rows], self.document_ids[rows], self.sequence_index[rows], teacher_tokens
        )

    def microbatches(self, size: int) -> list["Batch"]:
        """Split into microbatches of ``size`` sequences, each with its targets."""
        batches = [
            self.select(slice(first, first + size)) for first in range(0, len(self.tokens), size)
        ]
        if self.targets is None:
            return batches

        per_microbatch = zip(*(part.unbind() for part in self.targets), strict=True)
        return [
            replace(batch, targets=TargetIndex(*parts))
            for batch, parts in zip(batches, per_microbatch, strict=True)
        ]


def loss_mask(batch: Batch, block_size: int, eos: int) -> Tensor:
    """Mask of the tokens that carry loss, [B, S] bool.

    A block is a target if the block before it belongs to the same document, so the BOS block of a
    document is only input. EOS padding after the first EOS carries no loss.
    """
    blocks = batch.document_ids.unflatten(1, (-1, block_size))
    is_target = torch.zeros_like(blocks, dtype=torch.bool)
    is_target[:, 1:] = (blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] >= 0)

    # exclusive cumulative sum: the first EOS itself still counts
    is_eos = (batch.tokens == eos).unflatten(1, (-1, block_size))
    num_eos_before = is_eos.cumsum(-1) - is_eos.long()
    return (is_target & (num_eos_before == 0)).flatten(1)


@dataclass(frozen=True)
class TargetFinder:
    """Finds what carries loss. It can be sent to the processes that load data.

    Attributes:
        block_size: M.
        eos: id of the token that ends a document.
        has_next_token_loss: the model learns from the token after every state; False: T is 0.
        positions: [S'] positions in the sequence of this rank's states, whole blocks, on the CPU;
            None: all of the sequence's.
        micro_batch_size: sequences per microbatch.
        max_targets_per_sequence: no sequence of the data has more target blocks; None: any number.
    """

    block_size: int
    eos: int
    has_next_token_loss: bool = False
    positions: Tensor | None = None
    micro_batch_size: int = 0
    max_targets_per_sequence: int | None = None

    def find(self, batch: Batch, capacity: int | None = None) -> TargetIndex:
        """Find the targets of one microbatch.

        Args:
            batch: the microbatch; its device is that of the result.
            capacity: C, to which the index is padded (T is M·C). None: no padding, so the shapes
                depend on the data, and on a GPU the host waits.
        """
        m = self.block_size
        mask = loss_mask(batch, m, self.eos)
        device = mask.device
        length = mask.shape[1]
        positions = (
            torch.arange(length, device=device)
            if self.positions is None
            else self.positions.to(device)
        )

        # The target of the states of block i is block i + 1; the last block of a sequence has none.
        next_block = positions[::m] // m + 1
        has_target = F.pad(mask.unflatten(1, (-1, m)).any(-1), (0, 1))[:, next_block]
        row, column = has_target.nonzero(as_tuple=True)
        context_blocks = row * len(next_block) + column
        target_blocks = row * (length // m) + next_block[column]
        valid = mask.view(-1, m)[target_blocks]

        # With causal attention every state could be the last of its block, so the backbone learns
        # from every token and not only from every m-th.
        has_next = F.pad(mask, (0, 1))[:, positions + 1] & self.has_next_token_loss
        row, column = has_next.nonzero(as_tuple=True)
        states = row * len(positions) + column
        next_positions = row * length + positions[column] + 1
        next_valid = torch.ones_like(states, dtype=torch.bool)

        index = TargetIndex(
            context_blocks, target_blocks, valid, states, next_positions, next_valid
        )
        return index if capacity is None else self._pad(index, capacity)

    def _pad(self, index: TargetIndex, capacity: int) -> TargetIndex:
        num_states = self.block_size * capacity if self.has_next_token_loss else 0
        sizes = (capacity, capacity, capacity, num_states, num_states, num_states)
        return TargetIndex(
            *(_pad_rows(part, size) for part, size in zip(index, sizes, strict=True))
        )

    def find_all(self, batch: Batch) -> Batch:
        """Add the targets of each microbatch, padded to the capacity of all microbatches."""
        capacity = self.capacity(batch.tokens.shape[1])
        found = [
            self.find(microbatch, capacity)
            for microbatch in batch.microbatches(self.micro_batch_size)
        ]
        return replace(batch, targets=TargetIndex(*map(torch.stack, zip(*found, strict=True))))

    def capacity(self, sequence_length: int) -> int:
        """C: room for the targets of any microbatch, as :attr:`max_targets_per_sequence` says.

        It is nearly all of the rank's blocks, or far fewer where documents are short.
        """
        length = sequence_length if self.positions is None else len(self.positions)
        every = self.micro_batch_size * length // self.block_size
        if self.max_targets_per_sequence is None:
            return every
        needed = self.micro_batch_size * self.max_targets_per_sequence
        rounded = -(-needed // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        return rounded if rounded < every else min(needed, every)


def _pad_rows(x: Tensor, num_rows: int) -> Tensor:
    """Pad with the rows in turn, or with False; without any row, with zeros.

    Real entries are repeated because the states of other blocks carry no loss and may be anything.
    They take turns because a GPU adds up the gradients of one entry after the other.
    """
    num_missing = num_rows - len(x)
    assert num_missing >= 0, f"{len(x)} targets in room for {num_rows}: the plan's bound is wrong"
    if x.dtype == torch.bool or not len(x):
        return torch.cat((x, x.new_zeros(num_missing, *x.shape[1:])))
    return x[torch.arange(num_rows, device=x.device) % len(x)]


def rows_and_columns(index: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Split indices into a flattened table into rows and columns."""
    return index // num_columns, index % num_columns
