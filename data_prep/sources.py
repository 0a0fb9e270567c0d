"""Files of text: .txt (one document a file), .jsonl (one a line) and .parquet (one a row), local or behind any fsspec URL.

Files come in the order of the arguments, those of a folder sorted by name. They are cut into chunks of about ``CHUNK_BYTES``, which
is what a worker takes at a time; nothing here parses a document, and no more than a chunk is held in memory.
"""

import importlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from bitlm_dist.data_prep import unpacking
from bitlm_dist.data_prep.settings import Settings

from bitlm_dist.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet")
PACKED = (".gz", ".zst")
CHUNK_BYTES = 2_000_000
LINE_BYTES = 16_000_000  # beside the text, what the other fields of a line may take
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class File:
    """One file of the corpus.

    Attributes:
        path: what opens it: a path or a URL.
        name: where it lies below its argument, for messages that must not hold a folder's name.
        source: number of the argument that named it.
        size: bytes as stored; 0 where the server does not say.
    """

    path: str
    name: str
    source: int
    size: int

    @property
    def kind(self) -> str:
        """Its suffix without that of a compression."""
        return _kind(self.plain_path) or ""

    @property
    def plain_path(self) -> str:
        """For messages."""
        return plain(self.path)


@dataclass(frozen=True)
class Chunk:
    """Documents not yet parsed.

    Attributes:
        source: number of the argument they come from.
        data: lines of JSON if ``ends`` is None, else texts end to end.
        ends: where each text ends in ``data``; -1 for a row without text.
        places: name of each text's file; or one name, then ``first`` is the number of the first line or row.
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

    def place(self, index: int) -> str:
        """Where document or line ``index`` is: ``file:line``, or the file of a single text."""
        return self.places[index] if self.first == 0 else f"{self.places[0]}:{self.first + index}"


def find_files(inputs: Sequence[str | Path]) -> list[File]:
    """The files that ``inputs`` name, in corpus order.

    Raises:
        UserError: one does not exist, is of another kind, or a folder holds no file of text; or its protocol's package is missing.
    """
    files: list[File] = []
    for source, given in enumerate(map(str, inputs)):
        files += _find_remote(given, source) if "://" in given else _find_local(Path(given), source)
    return files


def _find_local(given: Path, source: int) -> list[File]:
    if given.is_dir():
        inside = sorted(path for path in given.rglob("*") if path.is_file() and _kind(path.name))
        if not inside:
            raise UserError(f"{given} holds no {_kinds()}")
        return [File(str(p), p.relative_to(given).as_posix(), source, p.stat().st_size) for p in inside]
    if not given.exists():
        raise UserError(f"{given} does not exist")
    if not _kind(given.name):
        raise UserError(f"{given} is none of {', '.join(SUFFIXES)} (plain, .gz or .zst)")
    return [File(str(given), given.name, source, given.stat().st_size)]


def _find_remote(url: str, source: int) -> list[File]:
    try:
        system, root = importlib.import_module("fsspec.core").url_to_fs(url)
        if _kind(plain(url)):
            return [File(url, PurePosixPath(plain(url)).name, source, int(system.info(root)["size"] or 0))]
        found: dict[str, Any] = system.find(root, detail=True)
    except ImportError as error:
        raise UserError(f"{plain(url)}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{plain(url)} does not exist") from None
    except Exception as error:  # each protocol has errors of its own
        raise UserError(f"{plain(url)} cannot be read: {type(error).__name__}: {error}".replace(url, plain(url))) from None
    inside = sorted(path for path in found if _kind(path))
    if not inside:
        raise UserError(f"{plain(url)} holds no {_kinds()}")
    base = root.rstrip("/") + "/"
    return [File(system.unstrip_protocol(p), p.removeprefix(base), source, int(found[p].get("size") or 0)) for p in inside]


def plain(path: str) -> str:
    """A path as it is, a URL without its query, which often holds a key."""
    return path.partition("?")[0] if "://" in path else path


def _kinds() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file (plain, .gz or .zst)"


def _kind(name: str) -> str | None:
    suffixes = PurePosixPath(name).suffixes
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def chunks(files: Iterable[File], settings: Settings) -> Iterator[Chunk]:
    """The corpus in chunks, none across two arguments.

    Raises:
        UserError: a file cannot be read or unpacked, or a Parquet file has no such column; names the file.
    """
    begun, loose = 0, _Loose(settings)
    for file in files:
        if file.kind != ".txt" or file.source != loose.source:
            yield from loose.take()
        try:
            if file.kind == ".txt":
                yield from loose.add(file, begun)
            else:
                yield from (_parquet if file.kind == ".parquet" else _lines)(file, settings, begun)
        except UserError:
            raise
        except (OSError, EOFError, zlib.error) as error:
            text = getattr(error, "strerror", None) or error
            raise UserError(f"{file.plain_path} cannot be read: {text}") from None
        begun += file.size
    yield from loose.take()


def _open(file: File) -> BinaryIO:
    if "://" in file.path:
        return cast(BinaryIO, importlib.import_module("fsspec").open(file.path, "rb").open())
    return open(file.path, "rb")


class _Loose:
    """Collects small files of one document each into chunks."""

    def __init__(self, settings: Settings) -> None:
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
            for piece in unpacking.pieces(raw, file.plain_path):
                text.append(piece)
                size += len(piece)
                if size > self._limit > len(BOM):
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
    """Whole lines; one that is longer than any document may be is passed over and counted."""
    limit = 6 * settings.max_chars + LINE_BYTES if settings.max_chars else None  # \uXXXX: six bytes for a character
    held, line, too_long, skipping, first = bytearray(), 1, 0, False, True
    with _open(file) as raw:
        for piece in unpacking.pieces(raw, file.plain_path):
            if first and piece:
                piece, first = piece.removeprefix(BOM), False
            if skipping:
                end = piece.find(b"\n") + 1
                if not end:
                    continue
                piece, skipping, line = piece[end:], False, line + 1
            before = len(held)
            held += piece
            if len(held) < CHUNK_BYTES:
                continue
            cut = held.rfind(b"\n", before) + 1 or held.rfind(b"\n", 0, before) + 1
            if cut:
                data = bytes(memoryview(held)[:cut])
                del held[:cut]
                yield Chunk(file.source, data, None, (file.plain_path,), line, too_long, begun + min(raw.tell(), file.size))
                line, too_long = line + data.count(b"\n"), 0
            if limit is not None and len(held) > limit:
                held.clear()
                too_long, skipping = too_long + 1, True
    if held or too_long:
        yield Chunk(file.source, bytes(held), None, (file.plain_path,), line, too_long, begun + file.size)


def _parquet(file: File, settings: Settings, begun: int) -> Iterator[Chunk]:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{file.plain_path}: reading Parquet needs pyarrow: pip install 'bitlm-dist[parquet]'") from None
    with _open(file) as raw:
        try:
            table = parquet.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)
            _check_column(table.schema_arrow, settings.field, file, arrow)
            rows, row = max(1, table.metadata.num_rows), 0
            stored = sum(table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups))
            batch_size = max(1, min(100_000, CHUNK_BYTES * rows // max(1, stored)))
            for batch in table.iter_batches(batch_size=batch_size, columns=[settings.field], use_threads=False):
                texts = batch.column(0).cast(arrow.large_binary()).to_pylist()
                data = b"".join(text or b"" for text in texts)
                first, row = row + 1, row + len(texts)
                yield Chunk(
                    file.source, data, _ends(texts), (f"{file.plain_path}: row",), first, 0, begun + file.size * row // rows
                )
        except arrow.ArrowException as error:
            raise UserError(f"{file.plain_path} is no Parquet file that can be read: {str(error).splitlines()[0]}") from None


def _check_column(schema: Any, field: str, file: File, arrow: Any) -> None:
    if field not in schema.names:
        names = ", ".join(schema.names)
        raise UserError(f'{file.plain_path} has no column "{field}": choose one with --field ({names})')
    kind = schema.field(field).type
    if arrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind) or arrow.types.is_string_view(kind)):
        raise UserError(f'{file.plain_path}: the column "{field}" holds {kind}, expected strings: choose another with --field')
