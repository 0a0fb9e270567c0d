"""Documents into sequences of L tokens, as a plan that only needs the documents' lengths.

A packed document is m BOS tokens, its tokens, and EOS repeated to a multiple of m (at least one). Where a document is cut, at a
block's end, its rest opens **with the last block again**: that block is input only there, so every token is a target exactly once.

- ``greedy``: documents follow each other in the order of the stream, and one that does not fit is cut. Sequences are full, the
  last one of an epoch is padded.
- ``best_fit``: only documents longer than a sequence are cut; all pieces go, the longest first, into the fullest sequence that has
  room, over :data:`WINDOW` documents of the stream at a time. Sequences end with padding.

:attr:`Plan.waste` says what either costs.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PADDING = -1  # document id of padding
WINDOW = 2**14  # documents that best_fit arranges at once
PACKERS = ("greedy", "best_fit")


class Waste(NamedTuple):
    """Shares of all tokens of a plan that are input only for want of a better place, and of documents that were cut.

    ``padding``: after the last document of a sequence. ``repeated``: blocks that a cut document opens with again.
    """

    padding: float
    repeated: float
    cut: float


@dataclass(frozen=True)
class Plan:
    """Spans of documents by sequence: ``spans`` [P, 3] of (document, first block, blocks); ``first`` [sequences + 1] into it."""

    spans: NDArray[np.int64]
    first: NDArray[np.int64]
    capacity: int  # blocks a sequence

    def __len__(self) -> int:
        return len(self.first) - 1

    def of(self, sequence: int) -> NDArray[np.int64]:
        """The spans of one sequence."""
        return self.spans[self.first[sequence] : self.first[sequence + 1]]

    @property
    def waste(self) -> Waste:
        """What packing costs."""
        total = max(1, len(self) * self.capacity)
        spans = np.unique(self.spans[:, 0], return_counts=True)[1]
        again = int(spans.sum()) - len(spans)
        return Waste(1 - int(self.spans[:, 2].sum()) / total, again / total, float((spans > 1).sum()) / max(1, len(spans)))


def packed_blocks(lengths: NDArray[np.int64], block: int) -> NDArray[np.int64]:
    """Blocks of each document with its BOS block and EOS padding."""
    return 2 + lengths // block


def pack(lengths: NDArray[np.int64], order: NDArray[np.int64], *, block: int, sequence_length: int, packer: str = "greedy") -> Plan:
    """Plan of the documents ``order`` with ``lengths`` tokens each, for sequences of ``sequence_length`` tokens."""
    capacity = sequence_length // block
    assert capacity >= 2, "a sequence holds at least two blocks, else no cut document would ever end"
    blocks = packed_blocks(lengths, block)[order]
    if packer == "greedy":
        spans, first = _greedy(blocks, capacity)
    else:
        assert packer == "best_fit"
        spans, first = _best_fit(blocks, capacity)
    spans[:, 0] = order[spans[:, 0]]
    return Plan(spans, first, capacity)


def _greedy(blocks: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Spans, with places in ``blocks`` for documents, and each sequence's first one."""
    ends = np.cumsum(blocks)
    if not len(ends):
        return np.empty((0, 3), dtype=np.int64), np.zeros(1, dtype=np.int64)
    # where sequences begin in the stream of blocks: at the end of the one before, or a block earlier inside a document
    bounds, starts, at, total = ends.tolist(), [0], capacity, int(ends[-1])
    while at < total:
        inside = bounds[bisect_left(bounds, at)] != at
        starts.append(at - inside)
        at += capacity - inside
    begin = np.array(starts)
    end = np.minimum(begin + capacity, total)
    from_, to = np.searchsorted(ends, begin, side="right"), np.searchsorted(ends, end, side="left")
    counts = to - from_ + 1
    first = np.concatenate([[0], np.cumsum(counts)])
    sequence = np.repeat(np.arange(len(begin)), counts)
    document = np.arange(first[-1]) - first[sequence] + from_[sequence]
    opens = ends[document] - blocks[document]
    start = np.maximum(begin[sequence], opens)
    spans = np.stack([document, start - opens, np.minimum(end[sequence], ends[document]) - start], 1)
    return spans, first


def _best_fit(blocks: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As :func:`_greedy`."""
    parts, counts = [], []
    for begin in range(0, len(blocks), WINDOW):
        pieces = _pieces(blocks[begin : begin + WINDOW], capacity)
        pieces[:, 0] += begin
        order, sizes = _arranged(pieces[:, 2], capacity)
        parts.append(pieces[order])
        counts.append(sizes)
    if not parts:
        return np.empty((0, 3), dtype=np.int64), np.zeros(1, dtype=np.int64)
    return np.concatenate(parts), np.concatenate([[0], np.cumsum(np.concatenate(counts))])


def _pieces(blocks: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Documents as spans [P, 3] that fit into a sequence, each but a document's first beginning with the block before it."""
    counts = 1 + np.maximum(0, -(-(blocks - capacity) // (capacity - 1)))
    document = np.repeat(np.arange(len(blocks)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * (capacity - 1)
    return np.stack([document, start, np.minimum(capacity, blocks[document] - start)], 1)


def _arranged(sizes: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Best fit of pieces with ``sizes`` blocks, the longest first.

    Returns:
        The pieces, sequence after sequence, sequences in the order of their earliest piece; and how many pieces each has.
    """
    longest_first = np.argsort(-sizes, kind="stable")
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # sequences by free blocks
    rooms: list[int] = []  # for which there are any, ascending
    place, opened = np.empty(len(sizes), dtype=np.int64), 0
    for piece, size in zip(longest_first.tolist(), sizes[longest_first].tolist(), strict=True):
        fitting = bisect_left(rooms, size)
        if fitting == len(rooms):
            sequence, room, opened = opened, capacity, opened + 1
        else:
            room = rooms[fitting]
            sequence = with_room[room].pop()
            if not with_room[room]:
                del rooms[fitting]
        place[piece] = sequence
        room -= size
        if room:
            if not with_room[room]:
                insort(rooms, room)
            with_room[room].append(sequence)
    earliest = np.full(opened, len(sizes))
    np.minimum.at(earliest, place, np.arange(len(sizes)))
    rank = np.empty(opened, dtype=np.int64)
    rank[np.argsort(earliest)] = np.arange(opened)
    return np.argsort(rank[place], kind="stable"), np.bincount(rank[place], minlength=opened)


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
