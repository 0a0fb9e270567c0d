"""Which documents stay, in corpus order: the first copy of a text, and the first of texts that are nearly the same.

One process decides, document after document, so that the outcome is that of the corpus and no number of workers; workers have made
the hashes and signatures. Memory is bounded by that of :class:`~bitlm_dist.data_prep.hash_index.HashIndex`, disk grows with the
corpus: 24 bytes a document, with near deduplication 512 and 24 a band more.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bitlm_dist.data_prep.hash_index import HashIndex
from bitlm_dist.data_prep.near_duplicates import VALUES, band_keys, bands_for
from numpy.typing import NDArray

DUPLICATE, NEAR_DUPLICATE = "duplicate", "near_duplicate"


class Deduplication:
    """Decides on batches of documents, in order.

    Args:
        folder: for what does not fit into memory.
        exact: whether to drop equal texts.
        near: similarity from which a document is dropped; None: never.
    """

    def __init__(self, folder: Path, exact: bool, near: float | None) -> None:
        self._exact = HashIndex(folder / "exact") if exact else None
        self._near = _NearIndex(folder / "near", near) if near is not None else None

    def reasons(self, hashes: Sequence[bytes], signatures: NDArray[np.uint32] | None) -> list[str | None]:
        """Why each document is dropped, None if it stays.

        Args:
            hashes: of the texts, at least 16 bytes each.
            signatures: [documents, 128], or None without near deduplication.
        """
        reasons: list[str | None] = [None] * len(hashes)
        if self._exact:
            keys = [x[:16] for x in hashes]
            stored = self._exact.stored(keys)
            for i, key in enumerate(keys):
                if key in stored or self._exact.recent(key) is not None:
                    reasons[i] = DUPLICATE
                else:
                    self._exact.add(key, 0)
            self._exact.settle()
        if self._near and signatures is not None:
            self._near.mark(signatures, reasons)
        return reasons


class _NearIndex:
    def __init__(self, folder: Path, threshold: float) -> None:
        self._index = HashIndex(folder)
        self._threshold = threshold
        self._bands = bands_for(threshold)
        self._signatures = (folder / "signatures").open("w+b", buffering=1 << 20)
        self._kept = 0

    def mark(self, signatures: NDArray[np.uint32], reasons: list[str | None]) -> None:
        keys = band_keys(signatures, *self._bands)
        stored = self._index.stored([key for document in keys for key in document])
        for i, document in enumerate(keys):
            if reasons[i]:
                continue
            known = [self._index.recent(key) if key not in stored else stored[key] for key in document]
            if any(self._similar(number, signatures[i]) for number in sorted({x for x in known if x is not None})):
                reasons[i] = NEAR_DUPLICATE
                continue
            for key, number in zip(document, known, strict=True):
                if number is None:
                    self._index.add(key, self._kept)
            self._signatures.seek(0, 2)
            self._signatures.write(signatures[i].tobytes())
            self._kept += 1
        self._index.settle()

    def _similar(self, number: int, signature: NDArray[np.uint32]) -> bool:
        size = 4 * VALUES
        self._signatures.seek(number * size)
        other = np.frombuffer(self._signatures.read(size), dtype=np.uint32)
        return float((other == signature).mean()) >= self._threshold
