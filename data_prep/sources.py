"""Files of text to chunks, which is what a worker takes at a time.

A document is a .txt file (or what lies between two separators of one), a line of .jsonl, a value of .json, or a row of .parquet,
.csv or .tsv. Chunks have about ``CHUNK_BYTES``. Nothing here parses a document except to find its end, and no more than a chunk is
held in memory.
"""

import importlib
import itertools
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

from bitlm_dist.data_prep import json_values, tables, unpacking
from bitlm_dist.data_prep.finding import File
from bitlm_dist.data_prep.separators import BOM, documents_between
from bitlm_dist.data_prep.settings import Settings

from bitlm_dist.errors import UserError

CHUNK_BYTES = 2_000_000
LINE_BYTES = 16_000_000  # beside the text, what the other fields of a line may take


@dataclass(frozen=True)
class Chunk:
    """Documents not yet parsed.

    Attributes:
        source: number of the argument they come from.
        data: lines of JSON if ``ends`` is None, else texts end to end.
        ends: where each text ends in ``data``; -1 for a row without text.
        places: name of each text's file; or one name, then ``first`` is the number of the first line, row or document.
        too_long: lines and files that were passed over for their size, before all documents of this chunk.
        position: bytes of the corpus, as stored, up to the end of this chunk.
    """

    source: int
    data: bytes
    ends: tuple[int, ...] | None
    places: tuple[str, ...]
    first: int
    too_long: int
    position: int

    @property
    def holds_files(self) -> bool:
        """Whether each document is a whole file."""
        return self.first == 0

    def place(self, index: int) -> str:
        """Where document or line ``index`` is: ``file:line``, or the file of a single text."""
        return self.places[index] if self.holds_files else f"{self.places[0]}:{self.first + index}"


def chunks(files: Iterable[File], settings: Settings) -> Iterator[Chunk]:
    """The corpus in chunks, none across two arguments.

    Raises:
        UserError: a file cannot be read or unpacked, a table has no such column, or a single document is too long; names the file.
    """
    begun, loose = 0, _Loose(settings)
    for file in files:
        whole = file.kind == ".txt" and settings.document_separator is None
        if not whole or file.source != loose.source:
            yield from loose.take()
        try:
            yield from loose.add(file, begun) if whole else _READERS[file.kind](file, settings, begun)
        except UserError:
            raise
        except (OSError, EOFError, zlib.error) as error:
            text = getattr(error, "strerror", None) or error
            raise UserError(f"{file.plain_path} cannot be read: {text}") from None
        begun += file.size
    yield from loose.take()


def too_long(settings: Settings) -> str:
    """What is wrong with a file that is one document of too many characters, and what to do."""
    return (
        f"is one document of more than {settings.max_chars:,} characters (--max-chars): cut it with --document-separator TEXT, "
        "allow more, or leave such files out with --on-error skip"
    )


def _open(file: File) -> BinaryIO:
    if "://" in file.path:
        return cast(BinaryIO, importlib.import_module("fsspec").open(file.path, "rb").open())
    return open(file.path, "rb")


def _pieces(raw: BinaryIO, file: File, settings: Settings) -> Iterator[bytes]:
    return unpacking.pieces(raw, file.plain_path, settings.max_unpack_ratio)


class _Loose:
    """Collects small files of one document each into chunks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._limit = 4 * settings.max_chars + len(BOM)  # no character takes more than four bytes
        self.source = -1
        self._clear()

    def _clear(self) -> None:
        self._texts: list[bytes] = []
        self._places: list[str] = []
        self._bytes = self._too_long = self._position = 0

    def add(self, file: File, begun: int) -> Iterator[Chunk]:
        self.source, self._position = file.source, begun + file.size
        with _open(file) as raw:
            text, size = [], 0
            for piece in _pieces(raw, file, self._settings):
                text.append(piece)
                size += len(piece)
                if size > self._limit > len(BOM):
                    if self._settings.on_error == "stop":
                        raise UserError(f"{file.plain_path} {too_long(self._settings)}")
                    self._too_long += 1
                    return
        self._texts.append(b"".join(text).removeprefix(BOM))
        self._places.append(file.plain_path)
        self._bytes += size
        if self._bytes >= CHUNK_BYTES:
            yield from self.take()

    def take(self) -> Iterator[Chunk]:
        if self._texts or self._too_long:
            ends = _ends(self._texts)
            yield Chunk(self.source, b"".join(self._texts), ends, tuple(self._places), 0, self._too_long, self._position)
        self._clear()


def _ends(texts: Sequence[bytes | None]) -> tuple[int, ...]:
    ends, end = [], 0
    for text in texts:
        end += len(text or b"")
        ends.append(-1 if text is None else end)
    return tuple(ends)


def _lines(file: File, settings: Settings, begun: int) -> Iterator[Chunk]:
    with _open(file) as raw:
        yield from _cut_lines(_pieces(raw, file, settings), file, settings, lambda: begun + min(raw.tell(), file.size))


def _cut_lines(pieces: Iterable[bytes], file: File, settings: Settings, position: Callable[[], int]) -> Iterator[Chunk]:
    """Whole lines; one that is longer than any document may be is passed over and counted."""
    limit = 6 * settings.max_chars + LINE_BYTES if settings.max_chars else None  # \uXXXX: six bytes for a character
    held, line, too_long, skipping, first = bytearray(), 1, 0, False, True
    searched = 0  # of ``held``, where no line ends
    for piece in pieces:
        if first and piece:
            piece, first = piece.removeprefix(BOM), False
        if skipping:
            end = piece.find(b"\n") + 1
            if not end:
                continue
            piece, skipping, line = piece[end:], False, line + 1
        held += piece
        if len(held) < CHUNK_BYTES:
            continue
        cut = held.rfind(b"\n", searched) + 1
        if cut:
            data = bytes(memoryview(held)[:cut])
            del held[:cut]
            yield Chunk(file.source, data, None, (file.plain_path,), line, too_long, position())
            line, too_long = line + data.count(b"\n"), 0
        searched = len(held)
        if limit is not None and len(held) > limit:
            held.clear()
            too_long, skipping, searched = too_long + 1, True, 0
    if held or too_long:
        yield Chunk(file.source, bytes(held), None, (file.plain_path,), line, too_long, position())


def _json(file: File, settings: Settings, begun: int) -> Iterator[Chunk]:
    """Lines, as many a .json file holds, or values with line breaks anywhere."""
    with _open(file) as raw:

        def position() -> int:
            return begun + min(raw.tell(), file.size)

        pieces, head = _pieces(raw, file, settings), b""
        while (
            b"\n" not in head.removeprefix(BOM).lstrip()
            and len(head) < unpacking.PIECE
            and (piece := next(pieces, None)) is not None
        ):
            head += piece
        pieces = itertools.chain([head], pieces)
        if json_values.are_lines(head.removeprefix(BOM)):
            yield from _cut_lines(pieces, file, settings, position)
            return
        limit = 6 * settings.max_chars + LINE_BYTES if settings.max_chars else None
        found = _Numbered(file, "value", position, as_lines=True)
        for value in json_values.values(pieces, file.plain_path, limit):
            yield from found.add(value)
        yield from found.take()


def _csv(file: File, settings: Settings, begun: int) -> Iterator[Chunk]:
    limit = settings.max_chars + LINE_BYTES if settings.max_chars else sys.maxsize
    with _open(file) as raw:
        found = _Numbered(file, "row", lambda: begun + min(raw.tell(), file.size))
        for text in tables.csv_texts(raw, file.plain_path, settings, "\t" if file.kind == ".tsv" else ",", limit):
            yield from found.add(text)
        yield from found.take()


def _parquet(file: File, settings: Settings, begun: int) -> Iterator[Chunk]:
    first = 1
    with _open(file) as raw:
        for texts, share in tables.parquet_texts(raw, file.plain_path, settings, CHUNK_BYTES):
            data, place = b"".join(text or b"" for text in texts), f"{file.plain_path}: row"
            yield Chunk(file.source, data, _ends(texts), (place,), first, 0, begun + int(file.size * share))
            first += len(texts)


def _separated(file: File, settings: Settings, begun: int) -> Iterator[Chunk]:
    """What lies between the separators of a .txt file; blank pieces are no documents."""
    with _open(file) as raw:
        found = _Numbered(file, "document", lambda: begun + min(raw.tell(), file.size))
        limit = 4 * settings.max_chars + len(BOM) if settings.max_chars else None
        for text in documents_between(settings.document_separator or "", _pieces(raw, file, settings), limit):
            yield from found.pass_over() if text is None else found.add(text)
        yield from found.take()


class _Numbered:
    """Collects numbered documents of one file into chunks.

    Args:
        file: where they come from.
        what: name of one, for messages.
        position: tells how much of the corpus is read.
        as_lines: whether they are lines of JSON, not texts.
    """

    def __init__(self, file: File, what: str, position: Callable[[], int], as_lines: bool = False) -> None:
        self._file, self._what, self._position, self._as_lines = file, what, position, as_lines
        self._held: list[bytes | None] = []
        self._first, self._bytes, self._too_long = 1, 0, 0

    def add(self, text: bytes | None) -> Iterator[Chunk]:
        """Take the next document; None: a row without text."""
        self._held.append(text)
        self._bytes += len(text or b"") + 1
        if self._bytes >= CHUNK_BYTES:
            yield from self.take()

    def pass_over(self) -> Iterator[Chunk]:
        """Count the next document as too long."""
        yield from self.take()
        self._first, self._too_long = self._first + 1, self._too_long + 1

    def take(self) -> Iterator[Chunk]:
        """What is collected, if anything is."""
        if self._held or self._too_long:
            data = (b"\n" if self._as_lines else b"").join(text or b"" for text in self._held)
            ends, place = None if self._as_lines else _ends(self._held), f"{self._file.plain_path}: {self._what}"
            yield Chunk(self._file.source, data, ends, (place,), self._first, self._too_long, self._position())
        self._first += len(self._held)
        self._held, self._bytes, self._too_long = [], 0, 0


_READERS: dict[str, Callable[[File, Settings, int], Iterator[Chunk]]] = {
    ".txt": _separated,
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
