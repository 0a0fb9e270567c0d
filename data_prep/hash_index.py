"""Map from 128-bit hashes to numbers in bounded memory: a dictionary and sorted files.

The latest hashes are in a dictionary. When it is full, it is written to a sorted file, and two
files of about the same size are merged. So there are never more than log2(hashes / dictionary size)
files. A merge processes one slice of hashes with the same first byte at a time, which keeps 1/256
of them in memory.

A file has three contiguous columns of uint64: first half of the hash, second half, number. It is
searched by bisection through a memory map, which is opened for one batch of queries and closed
again.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MAX_IN_MEMORY = 200_000  # hashes in the dictionary: about 35 MB
NUM_SLICES = 256  # slices per merge

# Each query maps a few pages of each file, and the kernel maps their neighbours.
QUERIES_PER_BATCH = 512

Columns = NDArray[np.uint64]  # [3, n]: first half, second half, number


class HashIndex:
    """Index of hashes, each with the number that it was added with.

    Args:
        folder: folder for the files. The caller removes them.
        max_in_memory: number of hashes from which the dictionary is written to disk.
    """

    def __init__(self, folder: Path, max_in_memory: int = MAX_IN_MEMORY) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._max_in_memory = max_in_memory
        self._in_memory: dict[bytes, int] = {}
        self._files: list[tuple[Path, int]] = []
        self._num_files_created = 0

    def find_on_disk(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """Look up hashes in the files.

        Call this once per batch, then :meth:`find_in_memory` for each hash that was not found.

        Args:
            keys: hashes of 16 bytes each.

        Returns:
            The numbers of those hashes that are on disk.
        """
        found: dict[bytes, int] = {}
        if not self._files:
            return found

        # Sorted queries: neighbours touch the same pages. Big-endian integers compare like bytes.
        for first in range(0, len(keys), QUERIES_PER_BATCH):
            batch = sorted(keys[first : first + QUERIES_PER_BATCH])
            halves = np.frombuffer(b"".join(batch), dtype=">u8").reshape(-1, 2).astype(np.uint64)
            for file, size in self._files:
                _search_file(np.memmap(file, np.uint64, "r", shape=(3, size)), halves, batch, found)
        return found

    def find_in_memory(self, key: bytes) -> int | None:
        """Return the number of a hash that is still in memory, or None."""
        return self._in_memory.get(key)

    def add(self, key: bytes, number: int) -> None:
        """Add a hash, which must be in neither the files nor the dictionary."""
        self._in_memory[key] = number

    def spill_if_full(self) -> None:
        """Write the dictionary to disk if it is full. Call this between two batches."""
        if len(self._in_memory) < self._max_in_memory:
            return

        keys = sorted(self._in_memory)
        columns = np.empty((3, len(keys)), dtype=np.uint64)
        columns[:2] = np.frombuffer(b"".join(keys), dtype=">u8").reshape(-1, 2).T
        columns[2] = np.fromiter(map(self._in_memory.__getitem__, keys), np.uint64, len(keys))

        file = self._new_file()
        columns.tofile(file)
        self._files.append((file, len(keys)))
        self._in_memory.clear()

        # Sizes stay decreasing, each less than half of the one before.
        while len(self._files) > 1 and self._files[-1][1] >= self._files[-2][1] // 2:
            self._merge()

    def _new_file(self) -> Path:
        self._num_files_created += 1
        return self._folder / f"{self._num_files_created:06d}"

    def _merge(self) -> None:
        """Merge the last two files."""
        inputs = [self._files.pop(), self._files.pop()]
        size = sum(size for _, size in inputs)
        num_written = 0
        merged = self._new_file()

        # Boundaries of the slices in each file, by the first byte of the hashes.
        edges = np.arange(NUM_SLICES, dtype=np.uint64) << np.uint64(56)
        cuts = [
            np.append(np.searchsorted(np.memmap(f, np.uint64, "r", shape=(n,)), edges), n)
            for f, n in inputs
        ]

        with merged.open("wb") as out:
            for i in range(NUM_SLICES):
                columns = np.concatenate(
                    [
                        _read_slice(f, n, *cut[i : i + 2].tolist())
                        for (f, n), cut in zip(inputs, cuts, strict=True)
                    ],
                    axis=1,
                )
                columns = columns[:, np.lexsort((columns[1], columns[0]))]

                # Columns are contiguous in the file, so each slice is written at three offsets.
                for number, column in enumerate(columns):
                    out.seek(8 * (number * size + num_written))
                    out.write(column.tobytes())
                num_written += columns.shape[1]

        self._files.append((merged, size))
        for file, _ in inputs:
            file.unlink()


def _read_slice(file: Path, size: int, begin: int, end: int) -> Columns:
    """Read a slice of a file, [3, end - begin].

    It is not mapped, as mapped pages count as memory until the map is closed.
    """
    return np.stack(
        [
            np.fromfile(file, np.uint64, end - begin, offset=8 * (column * size + begin))
            for column in range(3)
        ]
    )


def _search_file(
    columns: Columns, halves: NDArray[np.uint64], batch: Sequence[bytes], found: dict[bytes, int]
) -> None:
    """Look up a batch of hashes in one file.

    Args:
        columns: memory map of the file, [3, n].
        halves: the hashes as integers, [len(batch), 2].
        batch: the same hashes as bytes.
        found: numbers by hash, updated in place.
    """
    size = columns.shape[1]
    positions = np.searchsorted(columns[0], halves[:, 0])
    inside = np.flatnonzero(positions < size)

    for i in inside[columns[0][positions[inside]] == halves[inside, 0]].tolist():
        position = int(positions[i])
        # Several hashes may have the same first half.
        while position < size and columns[0, position] == halves[i, 0]:
            if columns[1, position] == halves[i, 1]:
                found[batch[i]] = int(columns[2, position])
            position += 1
