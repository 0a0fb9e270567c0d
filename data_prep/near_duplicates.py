"""MinHash signatures of documents, and the bands of them by which candidates are found.

A document is the set of its 5-grams of :mod:`~bitlm_dist.data_prep.words`. The signatures come from rensa 0.5: full-set R-MinHash
on hashes that we give it, 128 values a document. Why rensa and not datasketch 2.0: documentation of Debian packages takes 26 CPU-ms
a MB, grams included, against 190 with datasketch; it takes hashes from numpy, so that no Python object a gram is made; it has no
dependency, where datasketch brings scipy; and its estimates agree with brute force (a test). The indices of both live in memory, so
neither is used: the bands go into :class:`~bitlm_dist.data_prep.hash_index.HashIndex`, on disk.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from bitlm_dist.data_prep import words
from bitlm_dist.data_prep.filters import polynomial
from numpy.typing import NDArray

from bitlm_dist.errors import UserError

GRAM = 5  # words
VALUES = 128  # of a signature; the estimate's standard error is at most 0.044
RECALL = 0.95  # of pairs just at the threshold that become candidates, at least
SEED = 1


class Signatures:
    """Makes signatures.

    Raises:
        UserError: rensa is missing.
    """

    def __init__(self) -> None:
        try:
            self._rensa: Any = importlib.import_module("rensa")
        except ImportError:
            raise UserError("--near-dedup needs rensa: pip install 'bitlm-dist[dedup]'") from None

    def of(self, texts: Sequence[str]) -> NDArray[np.uint32]:
        """[documents, 128]; their share of equal values estimates the Jaccard similarity of two documents' 5-grams of words."""
        grams = [grams_of(text) for text in texts]
        offsets = np.concatenate([[0], np.cumsum([len(x) for x in grams])]).astype(np.uint64)
        flat = np.concatenate(grams) if grams else np.zeros(0, dtype=np.uint64)
        digests = self._rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, VALUES, SEED)
        return np.array(digests.to_rows(), dtype=np.uint32).reshape(len(texts), VALUES)


def grams_of(text: str) -> NDArray[np.uint64]:
    """Hashes of a document's 5-grams of words, lower case; a shorter document is one gram."""
    found = words.split(text)
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, found), np.uint64, len(found))
    return polynomial(hashes, min(GRAM, len(found)))


def bands_for(threshold: float) -> tuple[int, int]:
    """Bands and rows: the longest bands with which a pair at ``threshold`` shares one with probability ``RECALL``."""
    for rows in range(VALUES, 1, -1):
        bands = VALUES // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return VALUES, 1


def band_keys(signatures: NDArray[np.uint32], bands: int, rows: int) -> list[list[bytes]]:
    """A key of 16 bytes for each band of each signature; equal bands at the same place have equal keys."""
    cut = np.ascontiguousarray(signatures[:, : bands * rows]).reshape(len(signatures), bands, rows)
    return [[xxhash.xxh3_128_digest(band.tobytes(), seed=place) for place, band in enumerate(document)] for document in cut]
