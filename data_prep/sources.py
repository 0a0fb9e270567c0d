"""Cut input files into chunks, the unit of work of a worker.

A document is a .txt file (or the text between two separators in one), a line of .jsonl, a value
of .json, or a row of .parquet, .csv or .tsv. Chunks have about ``CHUNK_BYTES`` bytes. Documents
are parsed here only to find where they end, and at most one chunk is held in memory.
"""

import importlib
import itertools
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

from bitlm_dist.data_prep import decompression, json_values, tables
from bitlm_dist.data_prep.input_files import InputFile
from bitlm_dist.data_prep.remote_errors import remote_problem
from bitlm_dist.data_prep.separators import BOM, split_documents
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.errors import UserError

CHUNK_BYTES = 2_000_000
LINE_BYTES = 16_000_000  # allowed for the fields of a line besides the text


@dataclass(frozen=True)
class Chunk:
    """Documents that are not parsed yet.

    Attributes:
        source_index: Index of the input argument they come from.
        data: Lines of JSON if ``ends`` is None, else concatenated texts.
        ends: Offset in ``data`` at which each text ends; -1 for a row without text.
        file_names: Name of each text's file, or a single name for all.
        first_number: Number of the first line, row or document in the single file; 0 if each text
            is a whole file.
        num_too_long: Lines or files before this chunk's documents that were skipped for their size.
        corpus_offset: Bytes of the corpus, as stored, up to the end of this chunk.
    """

    source_index: int
    data: bytes
    ends: tuple[int, ...] | None
    file_names: tuple[str, ...]
    first_number: int
    num_too_long: int
    corpus_offset: int

    @property
    def is_file_per_document(self) -> bool:
        """True if each document is a whole file."""
        return self.first_number == 0

    def location(self, index: int) -> str:
        """Location of document or line ``index`` for messages: ``file:line``, or just the file."""
        return (
            self.file_names[index]
            if self.is_file_per_document
            else f"{self.file_names[0]}:{self.first_number + index}"
        )


def iter_chunks(files: Iterable[InputFile], settings: Settings) -> Iterator[Chunk]:
    """Yield the corpus in chunks; no chunk spans two input arguments.

    Raises:
        UserError: A file cannot be read or unpacked, a table has no such column, or a single
            document is too long. The message names the file.
    """
    corpus_offset = 0
    small_files = _SmallFileCollector(settings)
    for file in files:
        # Small files of one document each share a chunk; anything else ends it, to keep the order.
        is_single_document = file.file_format == ".txt" and settings.document_separator is None
        if not is_single_document or file.source_index != small_files.source_index:
            yield from small_files.flush()

        try:
            yield from (
                small_files.add(file, corpus_offset)
                if is_single_document
                else _CHUNKERS[file.file_format](file, settings, corpus_offset)
            )
        except UserError:
            # It already names the file.
            raise
        except Exception as error:
            if "://" in file.path:  # each protocol has exceptions of its own
                raise UserError(remote_problem(file.path, error)) from None
            if not isinstance(error, OSError | EOFError | zlib.error):
                raise
            text = getattr(error, "strerror", None) or error
            raise UserError(f"{file.display_path} cannot be read: {text}") from None
        corpus_offset += file.size

    yield from small_files.flush()


def too_long_message(settings: Settings) -> str:
    """Message for a file that is a single document with too many characters."""
    return (
        f"is one document of more than {settings.max_chars:,} characters (--max-chars): "
        r"cut it at its blank lines with --document-separator '\n\n', "
        "allow more (0: no limit), or leave such files out with --on-error skip"
    )


def _open_file(file: InputFile) -> BinaryIO:
    if "://" in file.path:
        return cast(BinaryIO, importlib.import_module("fsspec").open(file.path, "rb").open())
    return open(file.path, "rb")


def _decompressed_blocks(raw: BinaryIO, file: InputFile, settings: Settings) -> Iterator[bytes]:
    return decompression.decompressed_blocks(raw, file.display_path, settings.max_unpack_ratio)


class _SmallFileCollector:
    """Collects small files of one document each into chunks."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # UTF-8 takes up to four bytes per character.
        self._limit = 4 * settings.max_chars + len(BOM)
        self.source_index = -1
        self._clear()

    def _clear(self) -> None:
        self._texts: list[bytes] = []
        self._file_names: list[str] = []
        self._num_bytes = self._num_too_long = self._corpus_offset = 0

    def add(self, file: InputFile, corpus_offset: int) -> Iterator[Chunk]:
        """Add a file, and yield the chunk that it completes, if any."""
        self.source_index = file.source_index
        self._corpus_offset = corpus_offset + file.size
        with _open_file(file) as raw:
            text = []
            size = 0
            for block in _decompressed_blocks(raw, file, self._settings):
                text.append(block)
                size += len(block)
                # Checked while reading, as the file may not fit into memory. A limit of len(BOM)
                # comes from max_chars 0: unlimited.
                if size > self._limit > len(BOM):
                    if self._settings.on_error == "stop":
                        raise UserError(f"{file.display_path} {too_long_message(self._settings)}")
                    self._num_too_long += 1
                    return

        self._texts.append(b"".join(text).removeprefix(BOM))
        self._file_names.append(file.display_path)
        self._num_bytes += size
        if self._num_bytes >= CHUNK_BYTES:
            yield from self.flush()

    def flush(self) -> Iterator[Chunk]:
        """Yield the collected files, if any, as a chunk."""
        if self._texts or self._num_too_long:
            ends = _text_ends(self._texts)
            yield Chunk(
                self.source_index,
                b"".join(self._texts),
                ends,
                tuple(self._file_names),
                0,
                self._num_too_long,
                self._corpus_offset,
            )
        self._clear()


def _text_ends(texts: Sequence[bytes | None]) -> tuple[int, ...]:
    ends = []
    end = 0
    for text in texts:
        end += len(text or b"")
        ends.append(-1 if text is None else end)
    return tuple(ends)


def _line_chunks(file: InputFile, settings: Settings, corpus_offset: int) -> Iterator[Chunk]:
    with _open_file(file) as raw:
        yield from _cut_lines(
            _decompressed_blocks(raw, file, settings),
            file,
            settings,
            lambda: corpus_offset + min(raw.tell(), file.size),
        )


def _cut_lines(
    blocks: Iterable[bytes], file: InputFile, settings: Settings, position: Callable[[], int]
) -> Iterator[Chunk]:
    """Yield chunks of whole lines; a line that is too long for any document is only counted."""
    # JSON may spell a character as \uXXXX: six bytes.
    limit = 6 * settings.max_chars + LINE_BYTES if settings.max_chars else None

    buffer = bytearray()
    line = 1
    num_too_long = 0
    skipping = False  # inside a line that is too long
    first = True
    searched = 0  # bytes at the start of ``buffer`` that contain no line end
    for block in blocks:
        if first and block:
            block = block.removeprefix(BOM)
            first = False

        # The rest of a line that is too long is dropped block by block.
        if skipping:
            end = block.find(b"\n") + 1
            if not end:
                continue
            block = block[end:]
            skipping = False
            line += 1

        buffer += block
        if len(buffer) < CHUNK_BYTES:
            continue

        # A chunk ends at the last line end so far.
        cut = buffer.rfind(b"\n", searched) + 1
        if cut:
            data = bytes(memoryview(buffer)[:cut])
            del buffer[:cut]
            yield Chunk(
                file.source_index, data, None, (file.display_path,), line, num_too_long, position()
            )
            line += data.count(b"\n")
            num_too_long = 0

        searched = len(buffer)
        if limit is not None and len(buffer) > limit:
            buffer.clear()
            num_too_long += 1
            skipping = True
            searched = 0

    if buffer or num_too_long:
        yield Chunk(
            file.source_index,
            bytes(buffer),
            None,
            (file.display_path,),
            line,
            num_too_long,
            position(),
        )


def _json_chunks(file: InputFile, settings: Settings, corpus_offset: int) -> Iterator[Chunk]:
    """Yield chunks of a .json file, which holds JSON lines or values with arbitrary line breaks."""
    with _open_file(file) as raw:

        def position() -> int:
            return corpus_offset + min(raw.tell(), file.size)

        # The head decides between the two: it must contain a whole line, if there are lines.
        blocks = _decompressed_blocks(raw, file, settings)
        head = b""
        while (
            b"\n" not in head.removeprefix(BOM).lstrip()
            and len(head) < decompression.READ_BYTES
            and (block := next(blocks, None)) is not None
        ):
            head += block

        blocks = itertools.chain([head], blocks)
        if json_values.is_jsonl(head.removeprefix(BOM)):
            yield from _cut_lines(blocks, file, settings, position)
            return

        limit = 6 * settings.max_chars + LINE_BYTES if settings.max_chars else None
        collector = _RowCollector(file, "value", position, as_lines=True)
        for value in json_values.iter_values(blocks, file.display_path, limit):
            yield from collector.add(value)

        yield from collector.flush()


def _table_chunks(file: InputFile, settings: Settings, corpus_offset: int) -> Iterator[Chunk]:
    limit = settings.max_chars + LINE_BYTES if settings.max_chars else sys.maxsize  # characters
    with _open_file(file) as raw:
        collector = _RowCollector(file, "row", lambda: corpus_offset + min(raw.tell(), file.size))
        for text in tables.csv_texts(
            raw, file.display_path, settings, "\t" if file.file_format == ".tsv" else ",", limit
        ):
            yield from collector.add(text)

        yield from collector.flush()


def _parquet_chunks(file: InputFile, settings: Settings, corpus_offset: int) -> Iterator[Chunk]:
    first = 1  # number of the batch's first row
    with _open_file(file) as raw:
        for texts, fraction in tables.parquet_texts(raw, file.display_path, settings, CHUNK_BYTES):
            data = b"".join(text or b"" for text in texts)
            location = f"{file.display_path}: row"
            yield Chunk(
                file.source_index,
                data,
                _text_ends(texts),
                (location,),
                first,
                0,
                corpus_offset + int(file.size * fraction),
            )

            first += len(texts)


def _separated_text_chunks(
    file: InputFile, settings: Settings, corpus_offset: int
) -> Iterator[Chunk]:
    """Yield chunks of a .txt file that holds non-blank documents between separators."""
    with _open_file(file) as raw:
        collector = _RowCollector(
            file, "document", lambda: corpus_offset + min(raw.tell(), file.size)
        )

        limit = 4 * settings.max_chars + len(BOM) if settings.max_chars else None
        for text in split_documents(
            settings.document_separator or "", _decompressed_blocks(raw, file, settings), limit
        ):
            yield from collector.skip_too_long() if text is None else collector.add(text)

        yield from collector.flush()


class _RowCollector:
    """Collects numbered documents of one file into chunks.

    Args:
        file: File that they come from.
        row_name: Word for one of them in messages.
        position: Returns the bytes of the corpus read so far.
        as_lines: True if they are lines of JSON rather than texts.
    """

    def __init__(
        self, file: InputFile, row_name: str, position: Callable[[], int], as_lines: bool = False
    ) -> None:
        self._file = file
        self._row_name = row_name
        self._position = position
        self._as_lines = as_lines

        self._texts: list[bytes | None] = []
        self._first_number = 1
        self._num_bytes = 0
        self._num_too_long = 0

    def add(self, text: bytes | None) -> Iterator[Chunk]:
        """Add the next document; None: a row without text."""
        self._texts.append(text)
        self._num_bytes += len(text or b"") + 1
        if self._num_bytes >= CHUNK_BYTES:
            yield from self.flush()

    def skip_too_long(self) -> Iterator[Chunk]:
        """Count the next document as too long."""
        # A chunk counts only skipped documents that precede its own.
        yield from self.flush()
        self._first_number += 1
        self._num_too_long += 1

    def flush(self) -> Iterator[Chunk]:
        """Yield the collected documents, if any, as a chunk."""
        if self._texts or self._num_too_long:
            data = (b"\n" if self._as_lines else b"").join(text or b"" for text in self._texts)
            ends = None if self._as_lines else _text_ends(self._texts)
            location = f"{self._file.display_path}: {self._row_name}"
            yield Chunk(
                self._file.source_index,
                data,
                ends,
                (location,),
                self._first_number,
                self._num_too_long,
                self._position(),
            )

        self._first_number += len(self._texts)
        self._texts = []
        self._num_bytes = 0
        self._num_too_long = 0


_CHUNKERS: dict[str, Callable[[InputFile, Settings, int], Iterator[Chunk]]] = {
    ".txt": _separated_text_chunks,
    ".jsonl": _line_chunks,
    ".ndjson": _line_chunks,
    ".json": _json_chunks,
    ".csv": _table_chunks,
    ".tsv": _table_chunks,
    ".parquet": _parquet_chunks,
}
