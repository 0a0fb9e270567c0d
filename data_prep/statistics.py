"""Corpus statistics that codes are made from: counts, and a context vector for each token (method, section 9, item 0)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 512  # most frequent tokens that count as context, on each side
DIMENSIONS = 48


def token_statistics(
    documents: Iterable[NDArray[np.integer[Any]]], vocabulary: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Counts [V] and context vectors [V, <= 48] of a corpus of token arrays.

    A token's vector is the positive PMI with the 512 most frequent tokens as left and as right neighbour, reduced by a singular
    value decomposition.
    """
    stream = list(documents)
    counts = np.zeros(vocabulary, dtype=np.int64)
    for tokens in stream:
        counts += np.bincount(tokens, minlength=vocabulary)
    frequent = np.argsort(-counts, kind="stable")[:NEIGHBOURS]
    column = np.full(vocabulary, -1, dtype=np.int64)
    column[frequent] = np.arange(len(frequent))
    pairs = np.zeros((vocabulary, 2 * len(frequent)), dtype=np.float32)
    for tokens in stream:
        before, after = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
        _count(pairs, after, column[before])
        _count(pairs, before, column[after], len(frequent))
    return counts, _reduce(_positive_pmi(pairs))


def _count(pairs: NDArray[np.float32], row: NDArray[np.int64], column: NDArray[np.int64], offset: int = 0) -> None:
    seen = column >= 0
    np.add.at(pairs, (row[seen], column[seen] + offset), 1.0)


def _positive_pmi(pairs: NDArray[np.float32]) -> NDArray[np.float32]:
    total = pairs.sum()
    expected = pairs.sum(1, keepdims=True) * (pairs.sum(0, keepdims=True) / max(float(total), 1.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(pairs / expected)
    return np.maximum(np.nan_to_num(pmi, nan=0.0, neginf=0.0), 0.0)


def _reduce(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    # the Gram matrix is small (1,024 squared) whatever the vocabulary
    gram = matrix.T.astype(np.float64) @ matrix
    _, vectors = np.linalg.eigh(gram)
    return (matrix @ vectors[:, ::-1][:, :DIMENSIONS]).astype(np.float32)


def write(file: Path, counts: NDArray[np.int64], contexts: NDArray[np.float32], byte_lengths: NDArray[np.int64]) -> None:
    """Save the statistics."""
    with file.open("wb") as stream:
        np.savez(stream, counts=counts, contexts=contexts, byte_lengths=byte_lengths)
