"""Corpus statistics that codes are made from: counts, and a context vector for each token (method, section 9, item 0).

A token's vector is its positive PMI with the 512 most frequent tokens as left and as right neighbour, reduced by a singular value
decomposition. Memory and time are bounded whatever the vocabulary and the corpus: pairs are counted by number and kept sparse, the
decomposition is that of the ``ROWS`` most frequent tokens. Up to ``ROWS`` tokens nothing is approximated.

Legend: V vocabulary, F frequent tokens (at most 512), E dimensions of a vector (at most 48).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 512  # most frequent tokens that count as context, on each side
DIMENSIONS = 48
ROWS = 4096  # tokens whose vectors decide the decomposition, the most frequent; also the rows of a dense block
PAIR_TOKENS = 1 << 23  # of a larger vocabulary, tokens whose neighbours are counted
BATCH_TOKENS = 1 << 21

Tokens = NDArray[np.integer[Any]]
Sparse = tuple[NDArray[np.int64], NDArray[np.int64]]  # numbers of cells, ascending, and their counts


@dataclass(frozen=True)
class Context:
    """Which tokens count as context.

    Attributes:
        order: all tokens, the most frequent first, [V].
        column: place of each token among the frequent ones, -1 for others, [V].
        width: 2F, columns of the matrix of pairs.
    """

    order: NDArray[np.int64]
    column: NDArray[np.int32]
    width: int


def token_statistics(documents: Callable[[], Iterable[Tokens]], vocabulary: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Counts [V] and context vectors [V, E] of a corpus, in one piece.

    Args:
        documents: gives the token arrays of all documents, as often as it is called.
    """
    counts = count_tokens(documents(), vocabulary)
    context = context_of(counts)
    return counts, context_vectors(count_pairs(documents(), context), context)


def count_tokens(documents: Iterable[Tokens], vocabulary: int) -> NDArray[np.int64]:
    """How often each token occurs, [V]; sums over parts of a corpus are those of the whole."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for tokens, _ in _batches(documents):
        counts += np.bincount(tokens, minlength=vocabulary)
    return counts


def context_of(counts: NDArray[np.int64]) -> Context:
    """The most frequent tokens of counts [V]."""
    order = np.argsort(-counts, kind="stable")
    frequent = order[:NEIGHBOURS]
    column = np.full(len(counts), -1, dtype=np.int32)
    column[frequent] = np.arange(len(frequent))
    return Context(order, column, 2 * len(frequent))


def count_pairs(documents: Iterable[Tokens], context: Context) -> Sparse:
    """How often a token (row) has a frequent one before it (first half of the columns) or after it (second half).

    A cell's number is row * width + column. :func:`merge` makes those of parts of a corpus those of the whole.
    """
    sparse = len(context.column) > ROWS
    batches = (cells for batch in _batches(documents) for cells in _cells(*batch, context.column, context.width))
    return merge((_unique(np.sort(cells)) if sparse else _counted(cells) for cells in batches), context)


def merge(parts: Iterable[Sparse], context: Context) -> Sparse:
    """Add up counts of pairs."""
    if len(context.column) <= ROWS:  # an array of all cells is small
        dense = np.zeros(len(context.column) * context.width, dtype=np.int64)
        for cells, counts in parts:
            dense[cells] += counts
        cells = np.flatnonzero(dense)
        return cells, dense[cells]
    held = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)), *parts]
    if len(held) == 2:
        return held[1]
    cells = np.concatenate([part[0] for part in held])
    counts = np.concatenate([part[1] for part in held])
    order = np.argsort(cells, kind="stable")
    unique, repeated = _unique(cells[order])
    return unique, np.add.reduceat(counts[order], np.cumsum(repeated) - repeated) if len(counts) else counts


def context_vectors(pairs: Sparse, context: Context) -> NDArray[np.float32]:
    """The reduced vectors of all tokens, [V, E]."""
    row = pairs[0] // context.width
    column = pairs[0] - row * context.width
    values = _positive_pmi(row, column, pairs[1], context)
    return _reduce(row, column, values, context)


def _batches(documents: Iterable[Tokens]) -> Iterator[tuple[Tokens, NDArray[np.int64]]]:
    """Documents end to end, and where each ends, about ``BATCH_TOKENS`` at a time."""
    held: list[Tokens] = []
    size = 0
    for tokens in documents:
        held.append(tokens)
        size += len(tokens)
        if size >= BATCH_TOKENS:
            yield np.concatenate(held), np.cumsum([len(x) for x in held])
            held, size = [], 0
    if held:
        yield np.concatenate(held), np.cumsum([len(x) for x in held])


def _cells(tokens: Tokens, ends: NDArray[np.int64], column: NDArray[np.int32], width: int) -> Iterator[NDArray[Any]]:
    # a cell's number fits 32 bits for vocabularies up to four million; sorting these is twice as fast
    number: Any = np.uint32 if len(column) * width < 2**32 else np.int64
    place = column[tokens]
    rows = tokens.astype(number) * number(width)
    inside = np.ones(len(tokens), dtype=bool)
    inside[ends - 1] = False  # the last token of a document has none after it
    follows = inside[:-1]
    kept = np.flatnonzero((place[:-1] >= 0) & follows)
    yield rows[1:][kept] + place[:-1][kept].astype(number)
    kept = np.flatnonzero((place[1:] >= 0) & follows)
    yield rows[:-1][kept] + (place[1:][kept].astype(number) + number(width // 2))


def _unique(cells: NDArray[Any]) -> Sparse:
    first = np.flatnonzero(np.concatenate([[True], cells[1:] != cells[:-1]])) if len(cells) else np.zeros(0, dtype=np.int64)
    return cells[first].astype(np.int64), np.diff(np.append(first, len(cells)))


def _counted(cells: NDArray[Any]) -> Sparse:
    found = np.bincount(cells)
    unique = np.flatnonzero(found)
    return unique, found[unique]


def _positive_pmi(
    row: NDArray[np.int64], column: NDArray[np.int64], counts: NDArray[np.int64], context: Context
) -> NDArray[np.float32]:
    rows = np.bincount(row, weights=counts, minlength=len(context.column))
    columns = np.bincount(column, weights=counts, minlength=context.width)
    pmi = np.log(counts * (counts.sum() / (rows[row] * columns[column])))
    return np.maximum(pmi, 0.0).astype(np.float32)


def _reduce(
    row: NDArray[np.int64], column: NDArray[np.int64], values: NDArray[np.float32], context: Context
) -> NDArray[np.float32]:
    """Project the rows on the first right singular vectors of those of the most frequent tokens."""

    def block(tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        dense = np.zeros((len(tokens), context.width), dtype=np.float32)
        begins, ends = np.searchsorted(row, tokens), np.searchsorted(row, tokens, side="right")
        lengths = ends - begins
        inside = np.repeat(begins - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        dense[np.repeat(np.arange(len(tokens)), lengths), column[inside]] = values[inside]
        return dense

    vocabulary = len(context.column)
    top = block(np.sort(context.order[:ROWS]))
    precision: Any = np.float64 if vocabulary <= ROWS else np.float32
    gram = (top.T.astype(precision) @ top).astype(np.float64)  # small whatever the vocabulary
    vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :DIMENSIONS].astype(precision)
    contexts = np.zeros((vocabulary, vectors.shape[1]), dtype=np.float32)
    with_pairs = np.unique(row)
    for first in range(0, len(with_pairs), ROWS):
        tokens = with_pairs[first : first + ROWS]
        contexts[tokens] = block(tokens) @ vectors
    return contexts


def write(file: Path, counts: NDArray[np.int64], contexts: NDArray[np.float32], byte_lengths: NDArray[np.int64]) -> None:
    """Save the statistics."""
    with file.open("wb") as stream:
        np.savez(stream, counts=counts, contexts=contexts, byte_lengths=byte_lengths)
