"""Corpus statistics for codes: counts and a context vector per token (docs/recipe.md).

A token's vector is its positive PMI with the 512 most frequent tokens as left and as right
neighbors, reduced by a singular value decomposition. Memory and time are bounded for any
vocabulary and corpus: pair counts are sparse, and the decomposition uses only the ``ROWS`` most
frequent tokens. For vocabularies of up to ``ROWS`` tokens the result is exact.

Legend: V vocabulary, F frequent tokens (at most 512), E dimensions of a vector (at most 48).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitlm_dist.files import save_npz

MAX_CONTEXT_TOKENS = 512  # frequent tokens that count as context, per side
MAX_CONTEXT_DIM = 48
ROWS = 4096  # most frequent tokens used for the decomposition; also the rows of a dense block
MAX_PAIR_TOKENS = 1 << 23  # corpus tokens whose neighbors are counted, for V > ROWS
BATCH_TOKENS = 1 << 21

Tokens = NDArray[np.integer[Any]]
# Cell indices in ascending order, and the count of each cell.
SparseCounts = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class ContextTokens:
    """Tokens that count as context.

    Attributes:
        tokens_by_frequency: All tokens, most frequent first, [V].
        context_column: Rank of each token among the frequent ones, -1 for others, [V].
        num_columns: 2F, the columns of the pair matrix.
    """

    tokens_by_frequency: NDArray[np.int64]
    context_column: NDArray[np.int32]
    num_columns: int


def token_statistics(
    documents: Callable[[], Iterable[Tokens]], vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Compute counts [V] and context vectors [V, E] of a corpus in one go.

    Args:
        documents: Returns the token arrays of all documents; called twice.
        vocab_size: V.
    """
    counts = count_tokens(documents(), vocab_size)
    context = select_context_tokens(counts)
    return counts, context_vectors(count_pairs(documents(), context), context)


def count_tokens(documents: Iterable[Tokens], vocab_size: int) -> NDArray[np.int64]:
    """Count the occurrences of each token, [V]; counts of parts of a corpus add up."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens, _ in _batches(documents):
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def select_context_tokens(counts: NDArray[np.int64]) -> ContextTokens:
    """Select the most frequent tokens by their counts [V]."""
    order = np.argsort(-counts, kind="stable")
    frequent = order[:MAX_CONTEXT_TOKENS]
    column = np.full(len(counts), -1, dtype=np.int32)
    column[frequent] = np.arange(len(frequent))
    return ContextTokens(order, column, 2 * len(frequent))


def count_pairs(documents: Iterable[Tokens], context: ContextTokens) -> SparseCounts:
    """Count how often each token (row) has each frequent one as a neighbor (column).

    The first half of the columns counts predecessors, the second half successors. The index of a
    cell is row * num_columns + column. :func:`merge_pair_counts` adds up the counts of parts of a
    corpus.
    """
    # A bincount allocates every cell, which only a small vocabulary can afford.
    sparse = len(context.context_column) > ROWS
    batches = (
        cells
        for batch in _batches(documents)
        for cells in _pair_cells(*batch, context.context_column, context.num_columns)
    )
    return merge_pair_counts(
        (
            _count_sorted(np.sort(cells)) if sparse else _count_by_bincount(cells)
            for cells in batches
        ),
        context,
    )


def merge_pair_counts(parts: Iterable[SparseCounts], context: ContextTokens) -> SparseCounts:
    """Add up pair counts."""
    if len(context.context_column) <= ROWS:  # an array of all cells is small
        dense = np.zeros(len(context.context_column) * context.num_columns, dtype=np.int64)
        for cells, counts in parts:
            dense[cells] += counts
        cells = np.flatnonzero(dense)
        return cells, dense[cells]

    all_parts = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)), *parts]
    if len(all_parts) == 2:
        return all_parts[1]

    cells = np.concatenate([part[0] for part in all_parts])
    counts = np.concatenate([part[1] for part in all_parts])
    order = np.argsort(cells, kind="stable")

    # Runs of equal cells become one cell each, with the sum of their counts.
    unique, repeated = _count_sorted(cells[order])
    return unique, np.add.reduceat(counts[order], np.cumsum(repeated) - repeated) if len(
        counts
    ) else counts


def context_vectors(pairs: SparseCounts, context: ContextTokens) -> NDArray[np.float32]:
    """Compute the reduced context vectors of all tokens, [V, E]."""
    row = pairs[0] // context.num_columns
    column = pairs[0] - row * context.num_columns
    values = _positive_pmi(row, column, pairs[1], context)
    return _project(row, column, values, context)


def _batches(documents: Iterable[Tokens]) -> Iterator[tuple[Tokens, NDArray[np.int64]]]:
    """Yield concatenated documents of about ``BATCH_TOKENS`` tokens, and the end of each."""
    batch: list[Tokens] = []
    size = 0
    for tokens in documents:
        batch.append(tokens)
        size += len(tokens)
        if size >= BATCH_TOKENS:
            yield np.concatenate(batch), np.cumsum([len(x) for x in batch])
            batch = []
            size = 0

    if batch:
        yield np.concatenate(batch), np.cumsum([len(x) for x in batch])


def _pair_cells(
    tokens: Tokens, ends: NDArray[np.int64], column: NDArray[np.int32], num_columns: int
) -> Iterator[NDArray[Any]]:
    """Yield the cells of predecessors, then those of successors, of concatenated documents."""
    # Cell indices fit 32 bits for vocabularies up to four million; sorting these is twice as fast.
    index_dtype: Any = np.uint32 if len(column) * num_columns < 2**32 else np.int64
    context_columns = column[tokens]
    rows = tokens.astype(index_dtype) * index_dtype(num_columns)

    has_successor = np.ones(len(tokens), dtype=bool)
    has_successor[ends - 1] = False  # the last token of a document has none after it
    follows = has_successor[:-1]

    kept = np.flatnonzero((context_columns[:-1] >= 0) & follows)
    yield rows[1:][kept] + context_columns[:-1][kept].astype(index_dtype)

    kept = np.flatnonzero((context_columns[1:] >= 0) & follows)
    yield rows[:-1][kept] + (
        context_columns[1:][kept].astype(index_dtype) + index_dtype(num_columns // 2)
    )


def _count_sorted(cells: NDArray[Any]) -> SparseCounts:
    """Count equal cells that follow one another."""
    first = (
        np.flatnonzero(np.concatenate([[True], cells[1:] != cells[:-1]]))
        if len(cells)
        else np.zeros(0, dtype=np.int64)
    )
    return cells[first].astype(np.int64), np.diff(np.append(first, len(cells)))


def _count_by_bincount(cells: NDArray[Any]) -> SparseCounts:
    counts = np.bincount(cells)
    unique = np.flatnonzero(counts)
    return unique, counts[unique]


def _positive_pmi(
    row: NDArray[np.int64],
    column: NDArray[np.int64],
    counts: NDArray[np.int64],
    context: ContextTokens,
) -> NDArray[np.float32]:
    """Positive PMI of each pair; expectations come from the sums of rows and columns."""
    rows = np.bincount(row, weights=counts, minlength=len(context.context_column))
    columns = np.bincount(column, weights=counts, minlength=context.num_columns)
    pmi = np.log(counts * (counts.sum() / (rows[row] * columns[column])))
    return np.maximum(pmi, 0.0).astype(np.float32)


def _project(
    row: NDArray[np.int64],
    column: NDArray[np.int64],
    values: NDArray[np.float32],
    context: ContextTokens,
) -> NDArray[np.float32]:
    """Project all rows onto the top right singular vectors of the most frequent tokens' rows."""

    def dense_rows(tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        dense = np.zeros((len(tokens), context.num_columns), dtype=np.float32)
        # ``row`` is sorted: the values of a token are one slice of it.
        begins = np.searchsorted(row, tokens)
        ends = np.searchsorted(row, tokens, side="right")
        lengths = ends - begins

        inside = np.repeat(begins - np.cumsum(lengths) + lengths, lengths) + np.arange(
            lengths.sum()
        )
        dense[np.repeat(np.arange(len(tokens)), lengths), column[inside]] = values[inside]
        return dense

    vocab_size = len(context.context_column)
    # The eigenvectors of the Gram matrix [2F, 2F] are the right singular vectors.
    top = dense_rows(np.sort(context.tokens_by_frequency[:ROWS]))
    dtype: Any = np.float64 if vocab_size <= ROWS else np.float32
    gram = (top.T.astype(dtype) @ top).astype(np.float64)
    vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :MAX_CONTEXT_DIM].astype(dtype)

    # In blocks of ROWS tokens, so that the dense rows stay small for any vocabulary.
    contexts = np.zeros((vocab_size, vectors.shape[1]), dtype=np.float32)
    with_pairs = np.unique(row)
    for first in range(0, len(with_pairs), ROWS):
        tokens = with_pairs[first : first + ROWS]
        contexts[tokens] = dense_rows(tokens) @ vectors
    return contexts


def save_statistics(
    file: Path,
    counts: NDArray[np.int64],
    contexts: NDArray[np.float32],
    byte_lengths: NDArray[np.int64],
) -> None:
    """Save the statistics as an .npz file."""
    save_npz(file, counts=counts, contexts=contexts, byte_lengths=byte_lengths)
