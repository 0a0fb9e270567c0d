"""Documents into sequences of L tokens, in stream order, as a plan that only needs the documents' lengths.

A packed document is m BOS tokens, its tokens, and EOS repeated to a multiple of m (at least one). Documents follow each other; one
that does not fit is cut at a block's end, and its rest opens the next sequence **with the last block again**: that block is input
only there, so every token is a target exactly once. The last sequence of an epoch is padded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PADDING = -1  # document id of padding


@dataclass(frozen=True)
class Plan:
    """Spans of documents by sequence: ``spans`` [P, 3] of (document, first block, blocks); ``first`` [sequences + 1] into it."""

    spans: NDArray[np.int64]
    first: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.first) - 1

    def of(self, sequence: int) -> NDArray[np.int64]:
        """The spans of one sequence."""
        return self.spans[self.first[sequence] : self.first[sequence + 1]]


def packed_blocks(lengths: NDArray[np.int64], block: int) -> NDArray[np.int64]:
    """Blocks of each document with its BOS block and EOS padding."""
    return 2 + lengths // block


def pack(lengths: NDArray[np.int64], order: NDArray[np.int64], *, block: int, sequence_length: int) -> Plan:
    """Greedy plan of the documents ``order`` with ``lengths`` tokens each, for sequences of ``sequence_length`` tokens."""
    capacity = sequence_length // block
    assert capacity >= 2, "a sequence holds at least two blocks, else no cut document would ever end"
    blocks = packed_blocks(lengths, block)
    spans: list[tuple[int, int, int]] = []
    first = [0]
    room = capacity
    for document in order.tolist():
        start, total = 0, int(blocks[document])
        while True:
            taken = min(room, total - start)
            spans.append((document, start, taken))
            room -= taken
            if room == 0:
                first.append(len(spans))
                room = capacity
            if start + taken == total:
                break
            start += taken - 1
    if room < capacity:
        first.append(len(spans))
    return Plan(np.array(spans, dtype=np.int64).reshape(-1, 3), np.array(first, dtype=np.int64))


def assemble(
    spans: NDArray[np.int64],
    read: Callable[[int], NDArray[np.integer[Any]]],
    *,
    block: int,
    sequence_length: int,
    bos: int,
    eos: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and document ids [sequence_length] of one planned sequence; ids count the spans, :data:`PADDING` fills the rest."""
    tokens = np.full(sequence_length, eos, dtype=np.int64)
    ids = np.full(sequence_length, PADDING, dtype=np.int64)
    at = 0
    for number, (document, start, count) in enumerate(spans.tolist()):
        packed = packed_document(read(document), block=block, bos=bos, eos=eos)
        size = count * block
        tokens[at : at + size] = packed[start * block : start * block + size]
        ids[at : at + size] = number
        at += size
    return tokens, ids


def packed_document(tokens: NDArray[np.integer[Any]], *, block: int, bos: int, eos: int) -> NDArray[np.int64]:
    """m BOS, the tokens, EOS to a multiple of m."""
    size = int(packed_blocks(np.array(len(tokens)), block)) * block
    packed = np.full(size, eos, dtype=np.int64)
    packed[:block] = bos
    packed[block : block + len(tokens)] = tokens
    return packed
