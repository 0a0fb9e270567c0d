"""Packing of documents into sequences of L tokens, planned from the lengths of the documents alone.

A packed document is m BOS tokens, its tokens, and EOS repeated up to a multiple of m (at least
one). A document is cut at the end of a block, and the rest opens **with the last block again**.
That block is input only there, so every token is a target exactly once.

- ``greedy``: documents follow each other in the order of the stream, and one that does not fit is
  cut. All sequences are full, except that the last one of an epoch is padded.
- ``best_fit``: only documents longer than a sequence are cut. Chunks are placed in order of
  decreasing length, each into the fullest sequence that has room, over
  :data:`BEST_FIT_WINDOW` documents of the stream at a time. Sequences end with padding.

:attr:`PackingPlan.stats` tells the cost of each. Legend: m tokens per block, L tokens per sequence,
P spans.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PADDING_ID = -1  # document id of padding
BEST_FIT_WINDOW = 2**14  # documents that best_fit packs at a time
PACKERS = ("greedy", "best_fit")


class PackingStats(NamedTuple):
    """Cost of a packing plan.

    Attributes:
        padding_fraction: fraction of all tokens that are padding after the last document of a
            sequence.
        repeated_fraction: fraction of all tokens in blocks that a cut document opens with again.
        cut_fraction: fraction of the documents that are cut.
    """

    padding_fraction: float
    repeated_fraction: float
    cut_fraction: float


@dataclass(frozen=True)
class PackingPlan:
    """Spans of documents that make up each sequence.

    Attributes:
        document_spans: [P, 3], rows of (document, first block, number of blocks).
        sequence_offsets: [sequences + 1], offsets of each sequence's spans in ``document_spans``.
        blocks_per_sequence: L / m.
    """

    document_spans: NDArray[np.int64]
    sequence_offsets: NDArray[np.int64]
    blocks_per_sequence: int

    def __len__(self) -> int:
        return len(self.sequence_offsets) - 1

    def spans_of_sequence(self, sequence: int) -> NDArray[np.int64]:
        """Return the spans of one sequence, a slice of ``document_spans``."""
        return self.document_spans[
            self.sequence_offsets[sequence] : self.sequence_offsets[sequence + 1]
        ]

    @property
    def stats(self) -> PackingStats:
        """Cost of the plan in padding, repeated blocks and cut documents."""
        total = max(1, len(self) * self.blocks_per_sequence)

        # A document of n chunks repeats n - 1 blocks.
        chunks_per_document = np.unique(self.document_spans[:, 0], return_counts=True)[1]
        num_repeated_blocks = int(chunks_per_document.sum()) - len(chunks_per_document)

        return PackingStats(
            1 - int(self.document_spans[:, 2].sum()) / total,
            num_repeated_blocks / total,
            float((chunks_per_document > 1).sum()) / max(1, len(chunks_per_document)),
        )


def num_packed_blocks(lengths: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
    """Count the blocks of each packed document, including its BOS block and EOS padding."""
    return 2 + lengths // block_size


def max_targets_per_sequence(
    lengths: NDArray[np.int64], block_size: int, blocks_per_sequence: int
) -> int:
    """Bound of the target blocks of any sequence, for any order of the documents.

    The first block of each span of a document is input only, so a sequence has the most targets if
    it consists of the longest documents.

    Args:
        lengths: tokens per document.
        block_size: m.
        blocks_per_sequence: L / m.
    """
    if not len(lengths):
        return 0

    # Every packed document has at least two blocks.
    num_longest = min(len(lengths), -(-blocks_per_sequence // 2))
    longest = np.partition(lengths, len(lengths) - num_longest)[len(lengths) - num_longest :]
    total_blocks = num_packed_blocks(np.sort(longest)[::-1], block_size).cumsum()

    num_spans = int(np.searchsorted(total_blocks, blocks_per_sequence)) + 1
    if num_spans > num_longest:  # all documents fit in one sequence
        return int(total_blocks[-1]) - num_longest
    return blocks_per_sequence - num_spans


def pack(
    lengths: NDArray[np.int64],
    order: NDArray[np.int64],
    *,
    block_size: int,
    sequence_length: int,
    packer: str = "greedy",
) -> PackingPlan:
    """Plan the packing of documents into sequences.

    Args:
        lengths: tokens per document.
        order: indices of the documents in the order of the stream.
        block_size: m.
        sequence_length: L, at least two blocks.
        packer: one of :data:`PACKERS`, see the module docstring.
    """
    blocks_per_sequence = sequence_length // block_size
    assert blocks_per_sequence >= 2, (
        "a sequence must hold two blocks: with one, a cut document would repeat it for ever"
    )

    num_blocks = num_packed_blocks(lengths, block_size)[order]
    if packer == "greedy":
        document_spans, sequence_offsets = _greedy(num_blocks, blocks_per_sequence)
    else:
        assert packer == "best_fit"
        document_spans, sequence_offsets = _best_fit(num_blocks, blocks_per_sequence)

    # The packers count documents in the order of the stream.
    document_spans[:, 0] = order[document_spans[:, 0]]
    return PackingPlan(document_spans, sequence_offsets, blocks_per_sequence)


def _greedy(
    num_blocks: NDArray[np.int64], blocks_per_sequence: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack the stream without gaps.

    Returns:
        The spans [P, 3], with indices into ``num_blocks`` as documents, and the offset of each
        sequence's first span [sequences + 1].
    """
    ends = np.cumsum(num_blocks)
    if not len(ends):
        return np.empty((0, 3), dtype=np.int64), np.zeros(1, dtype=np.int64)

    # A sequence begins in the stream of blocks where the one before it ends, or one block earlier
    # if that is inside a document.
    bounds = ends.tolist()
    starts = [0]
    position = blocks_per_sequence
    total = int(ends[-1])
    while position < total:
        inside = bounds[bisect_left(bounds, position)] != position
        starts.append(position - inside)
        position += blocks_per_sequence - inside

    # The first and the last document of each sequence.
    begin = np.array(starts)
    end = np.minimum(begin + blocks_per_sequence, total)
    from_ = np.searchsorted(ends, begin, side="right")
    to = np.searchsorted(ends, end, side="left")

    # One span for each pair of a sequence and a document that overlap.
    counts = to - from_ + 1
    sequence_offsets = np.concatenate([[0], np.cumsum(counts)])
    sequence = np.repeat(np.arange(len(begin)), counts)
    document = np.arange(sequence_offsets[-1]) - sequence_offsets[sequence] + from_[sequence]

    document_begin = ends[document] - num_blocks[document]
    start = np.maximum(begin[sequence], document_begin)
    document_spans = np.stack(
        [document, start - document_begin, np.minimum(end[sequence], ends[document]) - start], 1
    )
    return document_spans, sequence_offsets


def _best_fit(
    num_blocks: NDArray[np.int64], blocks_per_sequence: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack window after window by best fit. Returns the same as :func:`_greedy`."""
    spans_by_window = []
    chunks_per_sequence = []
    for begin in range(0, len(num_blocks), BEST_FIT_WINDOW):
        chunks = _split_into_chunks(
            num_blocks[begin : begin + BEST_FIT_WINDOW], blocks_per_sequence
        )
        chunks[:, 0] += begin
        order, sequence_chunks = _best_fit_order(chunks[:, 2], blocks_per_sequence)
        spans_by_window.append(chunks[order])
        chunks_per_sequence.append(sequence_chunks)

    if not spans_by_window:
        return np.empty((0, 3), dtype=np.int64), np.zeros(1, dtype=np.int64)
    return np.concatenate(spans_by_window), np.concatenate(
        [[0], np.cumsum(np.concatenate(chunks_per_sequence))]
    )


def _split_into_chunks(
    num_blocks: NDArray[np.int64], blocks_per_sequence: int
) -> NDArray[np.int64]:
    """Cut documents into spans [P, 3] that fit into a sequence.

    Each span but a document's first begins with the last block of the span before it.
    """
    # A first chunk brings all its blocks, each further one a block less: it repeats one.
    counts = 1 + np.maximum(0, -(-(num_blocks - blocks_per_sequence) // (blocks_per_sequence - 1)))
    document = np.repeat(np.arange(len(num_blocks)), counts)
    chunk_index = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)

    start = chunk_index * (blocks_per_sequence - 1)
    return np.stack(
        [document, start, np.minimum(blocks_per_sequence, num_blocks[document] - start)], 1
    )


def _best_fit_order(
    chunk_sizes: NDArray[np.int64], blocks_per_sequence: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack chunks of ``chunk_sizes`` blocks by best fit decreasing.

    Returns:
        The chunks, sequence after sequence, with the sequences in the order of their earliest
        chunk; and the number of chunks of each sequence.
    """
    longest_first = np.argsort(-chunk_sizes, kind="stable")
    sequences_by_free_blocks: list[list[int]] = [[] for _ in range(blocks_per_sequence + 1)]
    free_block_counts: list[int] = []  # those for which there are sequences, ascending
    sequence_of_chunk = np.empty(len(chunk_sizes), dtype=np.int64)
    num_sequences = 0

    for chunk, size in zip(
        longest_first.tolist(), chunk_sizes[longest_first].tolist(), strict=True
    ):
        # The fullest sequence with room, else a new one.
        fitting = bisect_left(free_block_counts, size)
        if fitting == len(free_block_counts):
            sequence = num_sequences
            free_blocks = blocks_per_sequence
            num_sequences += 1
        else:
            free_blocks = free_block_counts[fitting]
            sequence = sequences_by_free_blocks[free_blocks].pop()
            if not sequences_by_free_blocks[free_blocks]:
                del free_block_counts[fitting]

        sequence_of_chunk[chunk] = sequence
        free_blocks -= size
        if free_blocks:
            if not sequences_by_free_blocks[free_blocks]:
                insort(free_block_counts, free_blocks)
            sequences_by_free_blocks[free_blocks].append(sequence)

    # Back to the order of the stream: otherwise chunks would get shorter throughout a window.
    first_chunk = np.full(num_sequences, len(chunk_sizes))
    np.minimum.at(first_chunk, sequence_of_chunk, np.arange(len(chunk_sizes)))
    rank = np.empty(num_sequences, dtype=np.int64)
    rank[np.argsort(first_chunk)] = np.arange(num_sequences)

    return np.argsort(rank[sequence_of_chunk], kind="stable"), np.bincount(
        rank[sequence_of_chunk], minlength=num_sequences
    )


def assemble_sequence(
    document_spans: NDArray[np.int64],
    get_tokens: Callable[[int], NDArray[np.integer[Any]]],
    *,
    block_size: int,
    sequence_length: int,
    bos: int,
    eos: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Assemble one planned sequence.

    Args:
        document_spans: spans of the sequence, [P, 3].
        get_tokens: function from a document to its tokens.
        block_size: m.
        sequence_length: L.
        bos: token id of BOS.
        eos: token id of EOS.

    Returns:
        Tokens and document ids, both [L]. The ids count the spans; padding has
        :data:`PADDING_ID`.
    """
    tokens = np.full(sequence_length, eos, dtype=np.int64)
    ids = np.full(sequence_length, PADDING_ID, dtype=np.int64)
    position = 0

    for number, (document, start, num_blocks) in enumerate(document_spans.tolist()):
        packed = pack_document(get_tokens(document), block_size=block_size, bos=bos, eos=eos)
        size = num_blocks * block_size
        tokens[position : position + size] = packed[start * block_size : start * block_size + size]
        ids[position : position + size] = number
        position += size

    return tokens, ids


def pack_document(
    tokens: NDArray[np.integer[Any]], *, block_size: int, bos: int, eos: int
) -> NDArray[np.int64]:
    """Pack one document: m BOS, the tokens, and EOS up to a multiple of m."""
    size = int(num_packed_blocks(np.array(len(tokens)), block_size)) * block_size
    packed = np.full(size, eos, dtype=np.int64)
    packed[:block_size] = bos
    packed[block_size : block_size + len(tokens)] = tokens
    return packed
