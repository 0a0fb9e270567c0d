"""Deduplication: of equal or nearly equal texts, only the first in corpus order stays.

A single process decides, document by document, on hashes and signatures that workers computed. So
the result depends on the corpus alone, not on the number of workers. Memory is bounded, see
:class:`~bitlm_dist.data_prep.hash_index.HashIndex`. Disk usage grows with the corpus: 24 bytes per
document, and for near deduplication another 512 bytes plus 24 bytes per band.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitlm_dist.data_prep.hash_index import HashIndex
from bitlm_dist.data_prep.near_duplicates import SIGNATURE_SIZE, band_keys, choose_bands

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"


class Deduplicator:
    """Decides which documents to drop, batch by batch in corpus order.

    Args:
        folder: folder for the part of the index that does not fit into memory.
        exact: drop texts that are equal to an earlier one.
        near_threshold: drop texts whose estimated Jaccard similarity to an earlier one is at least
            this high; None: never.
    """

    def __init__(self, folder: Path, exact: bool, near_threshold: float | None) -> None:
        self._exact_index = HashIndex(folder / "exact") if exact else None
        self._near_index = (
            _NearDuplicateIndex(folder / "near", near_threshold)
            if near_threshold is not None
            else None
        )

    def drop_reasons(
        self, hashes: Sequence[bytes], signatures: NDArray[np.uint32] | None
    ) -> list[str | None]:
        """Decide on the next batch of documents.

        Args:
            hashes: hashes of the texts, at least 16 bytes each.
            signatures: MinHash signatures, [documents, 128]; None without near deduplication.

        Returns:
            For each document the reason why it is dropped, or None if it stays.
        """
        reasons: list[str | None] = [None] * len(hashes)

        if self._exact_index:
            keys = [x[:16] for x in hashes]
            stored = self._exact_index.find_on_disk(keys)

            # In order: a copy within the batch is found in memory.
            for i, key in enumerate(keys):
                if key in stored or self._exact_index.find_in_memory(key) is not None:
                    reasons[i] = DUPLICATE
                else:
                    self._exact_index.add(key, 0)
            self._exact_index.spill_if_full()

        if self._near_index and signatures is not None:
            self._near_index.mark_near_duplicates(signatures, reasons)
        return reasons


class _NearDuplicateIndex:
    """LSH index of the documents that stay, with their signatures on disk.

    Two documents are compared if they have a band in common, so that similar ones are found without
    comparing all pairs.
    """

    def __init__(self, folder: Path, threshold: float) -> None:
        self._index = HashIndex(folder)
        self._threshold = threshold
        self._bands = choose_bands(threshold)
        self._signatures = (folder / "signatures").open("w+b", buffering=1 << 20)
        self._num_kept = 0

    def mark_near_duplicates(
        self, signatures: NDArray[np.uint32], reasons: list[str | None]
    ) -> None:
        """Set the reason of each near duplicate, and add the documents that stay to the index.

        Args:
            signatures: [documents, 128].
            reasons: reasons so far, updated in place. Documents that have one are skipped.
        """
        keys = band_keys(signatures, *self._bands)
        stored = self._index.find_on_disk([key for document in keys for key in document])

        for i, document in enumerate(keys):
            if reasons[i]:
                continue

            # Candidates: the first document that stayed with each band of this one.
            numbers = [
                self._index.find_in_memory(key) if key not in stored else stored[key]
                for key in document
            ]
            if any(
                self._is_similar(number, signatures[i])
                for number in sorted({x for x in numbers if x is not None})
            ):
                reasons[i] = NEAR_DUPLICATE
                continue

            # It stays. Bands that are known keep the document that had them first.
            for key, number in zip(document, numbers, strict=True):
                if number is None:
                    self._index.add(key, self._num_kept)
            self._signatures.seek(0, 2)
            self._signatures.write(signatures[i].tobytes())
            self._num_kept += 1

        self._index.spill_if_full()

    def _is_similar(self, number: int, signature: NDArray[np.uint32]) -> bool:
        size = 4 * SIGNATURE_SIZE  # bytes of uint32 values
        self._signatures.seek(number * size)
        other = np.frombuffer(self._signatures.read(size), dtype=np.uint32)
        return float((other == signature).mean()) >= self._threshold
