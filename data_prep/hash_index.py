"""A set of 128-bit hashes with a number each, in bounded memory: the latest in a dictionary, the rest in sorted files.

When the dictionary is full it becomes a sorted file; two files of about the same size are merged, one slice of hashes with
the same first byte after another, so there are never more than log2(hashes / dictionary) files, and a merge holds 1/256 of them in
memory. A file has three columns of uint64 (first half of the hash, second half, number), each in one piece, and is searched by
bisection through a memory map that is opened for one batch of questions and closed again.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HELD = 200_000  # hashes in the dictionary: about 35 MB
BATCH = 512  # questions at a time: each maps a few pages of each file, and the kernel maps their neighbours
SLICES = 256  # of a merge

Columns = NDArray[np.uint64]  # [3, n]: first half, second half, number


class HashIndex:
    """The number that was first given to a hash.

    Args:
        folder: for its files; emptied by whoever made it.
        held: hashes in memory at most.
    """

    def __init__(self, folder: Path, held: int = HELD) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._limit = folder, held
        self._recent: dict[bytes, int] = {}
        self._files: list[tuple[Path, int]] = []
        self._made = 0

    def stored(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        """Those of ``keys`` (16 bytes each) that are in the files, with their numbers. Ask once a batch, then :meth:`recent`."""
        found: dict[bytes, int] = {}
        if not self._files:
            return found
        for first in range(0, len(keys), BATCH):
            batch = sorted(keys[first : first + BATCH])
            halves = np.frombuffer(b"".join(batch), dtype=">u8").reshape(-1, 2).astype(np.uint64)
            for file, size in self._files:
                _search(np.memmap(file, np.uint64, "r", shape=(3, size)), halves, batch, found)
        return found

    def recent(self, key: bytes) -> int | None:
        """The number of a hash that is still in memory."""
        return self._recent.get(key)

    def add(self, key: bytes, number: int) -> None:
        """Take in a hash that neither :meth:`stored` nor :meth:`recent` knows."""
        self._recent[key] = number

    def settle(self) -> None:
        """Between two batches: move to disk what no longer fits."""
        if len(self._recent) < self._limit:
            return
        keys = sorted(self._recent)
        columns = np.empty((3, len(keys)), dtype=np.uint64)
        columns[:2] = np.frombuffer(b"".join(keys), dtype=">u8").reshape(-1, 2).T
        columns[2] = np.fromiter(map(self._recent.__getitem__, keys), np.uint64, len(keys))
        file = self._new_file()
        columns.tofile(file)
        self._files.append((file, len(keys)))
        self._recent.clear()
        while len(self._files) > 1 and self._files[-1][1] >= self._files[-2][1] // 2:
            self._merge()

    def _new_file(self) -> Path:
        self._made += 1
        return self._folder / f"{self._made:06d}"

    def _merge(self) -> None:
        parts = [self._files.pop(), self._files.pop()]
        size, done, merged = sum(size for _, size in parts), 0, self._new_file()
        edges = np.arange(SLICES, dtype=np.uint64) << np.uint64(56)
        cuts = [np.append(np.searchsorted(np.memmap(f, np.uint64, "r", shape=(n,)), edges), n) for f, n in parts]
        with merged.open("wb") as out:
            for i in range(SLICES):
                columns = np.concatenate(
                    [_read(f, n, *cut[i : i + 2].tolist()) for (f, n), cut in zip(parts, cuts, strict=True)], axis=1
                )
                columns = columns[:, np.lexsort((columns[1], columns[0]))]
                for number, column in enumerate(columns):
                    out.seek(8 * (number * size + done))
                    out.write(column.tobytes())
                done += columns.shape[1]
        self._files.append((merged, size))
        for file, _ in parts:
            file.unlink()


def _read(file: Path, size: int, begin: int, end: int) -> Columns:
    """A slice of a file, read instead of mapped: what is mapped counts as memory until the map is closed."""
    return np.stack([np.fromfile(file, np.uint64, end - begin, offset=8 * (column * size + begin)) for column in range(3)])


def _search(columns: Columns, halves: NDArray[np.uint64], batch: Sequence[bytes], found: dict[bytes, int]) -> None:
    size = columns.shape[1]
    places = np.searchsorted(columns[0], halves[:, 0])
    inside = np.flatnonzero(places < size)
    for i in inside[columns[0][places[inside]] == halves[inside, 0]].tolist():
        place = int(places[i])
        while place < size and columns[0, place] == halves[i, 0]:  # two hashes may share their first half
            if columns[1, place] == halves[i, 1]:
                found[batch[i]] = int(columns[2, place])
            place += 1
