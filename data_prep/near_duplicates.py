"""MinHash signatures of documents, and the bands by which candidate pairs are found.

A document is represented by the set of its 5-grams of :mod:`~bitlm_dist.data_prep.words`. The
signatures come from rensa 0.5: full-set R-MinHash over hashes that we supply, 128 values per
document.

Why rensa and not datasketch 2.0: documentation of Debian packages takes 26 CPU-ms per MB, n-grams
included, against 190 with datasketch. It accepts hashes from numpy, so no Python object is made
per n-gram. It has no dependencies, where datasketch brings scipy. Its estimates agree with brute
force (a test).

The indices of both libraries live in memory, so neither is used: the bands go into
:class:`~bitlm_dist.data_prep.hash_index.HashIndex`, on disk.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from bitlm_dist.data_prep import words
from bitlm_dist.data_prep.filters import ngram_hashes
from bitlm_dist.errors import UserError

NGRAM_SIZE = 5  # in words
SIGNATURE_SIZE = 128  # values per signature; the estimate's standard error is at most 0.044
MIN_RECALL = 0.95  # fraction of pairs exactly at the threshold that must become candidates
SEED = 1


class MinHasher:
    """Computes MinHash signatures.

    Raises:
        UserError: rensa is missing.
    """

    def __init__(self) -> None:
        try:
            self._rensa: Any = importlib.import_module("rensa")
        except ImportError:
            raise UserError("--near-dedup needs rensa: pip install 'bitlm-dist[dedup]'") from None

    def signatures(self, texts: Sequence[str]) -> NDArray[np.uint32]:
        """Compute the signatures of documents.

        The fraction of equal values in two signatures estimates the Jaccard similarity of the
        documents' 5-grams.

        Returns:
            Signatures, [documents, SIGNATURE_SIZE].
        """
        # All documents in one call: flat hashes, and the offset at which each document begins.
        hashes = [word_ngram_hashes(text) for text in texts]
        offsets = np.concatenate([[0], np.cumsum([len(x) for x in hashes])]).astype(np.uint64)
        flat = np.concatenate(hashes) if hashes else np.zeros(0, dtype=np.uint64)

        digests = self._rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            flat, offsets, SIGNATURE_SIZE, SEED
        )
        return np.array(digests.to_rows(), dtype=np.uint32).reshape(len(texts), SIGNATURE_SIZE)


def word_ngram_hashes(text: str) -> NDArray[np.uint64]:
    """Hash the 5-grams of a document's lower-cased words; a shorter document is one n-gram."""
    text_words = words.split_at_whitespace(text)
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, text_words), np.uint64, len(text_words))
    return ngram_hashes(hashes, min(NGRAM_SIZE, len(text_words)))


def choose_bands(threshold: float) -> tuple[int, int]:
    """Choose the longest bands that find a pair at ``threshold`` with probability MIN_RECALL.

    Returns:
        The number of bands and the rows per band.
    """
    for rows_per_band in range(SIGNATURE_SIZE, 1, -1):
        num_bands = SIGNATURE_SIZE // rows_per_band
        # A pair agrees on one band with probability threshold ** rows_per_band.
        if 1 - (1 - threshold**rows_per_band) ** num_bands >= MIN_RECALL:
            return num_bands, rows_per_band
    return SIGNATURE_SIZE, 1


def band_keys(
    signatures: NDArray[np.uint32], num_bands: int, rows_per_band: int
) -> list[list[bytes]]:
    """Compute a 16-byte key for each band of each signature.

    Equal bands at the same index have equal keys.
    """
    banded = np.ascontiguousarray(signatures[:, : num_bands * rows_per_band]).reshape(
        len(signatures), num_bands, rows_per_band
    )
    return [
        [
            xxhash.xxh3_128_digest(band.tobytes(), seed=band_index)
            for band_index, band in enumerate(document)
        ]
        for document in banded
    ]
