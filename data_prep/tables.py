"""Columns of text in .parquet, .csv and .tsv files, one row after the other."""

import csv
import importlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from bitlm_dist.data_prep import unpacking
from bitlm_dist.data_prep.settings import Settings

from bitlm_dist.errors import UserError

LIST_SEPARATOR = "\n"  # between the strings of a list that is one document

Texts = list[bytes | None]  # None: a row without text


def csv_texts(raw: BinaryIO, path: str, settings: Settings, delimiter: str, limit: int) -> Iterator[bytes | None]:
    """Yield the text of each row of a .csv or .tsv file under its header, as RFC 4180 quotes it; empty lines are no rows.

    Bytes that are not UTF-8 are yielded as they are.

    Args:
        raw: opened from ``path``.
        path: for its compression and for messages.
        settings: the column, and what becomes of bad rows.
        delimiter: between two columns.
        limit: characters that a line or a field may have.

    Raises:
        UserError: there is no such column, or it is there twice; the quoting is broken; or, unless bad lines are skipped, a row has
            more or fewer columns than the header.
    """
    csv.field_size_limit(limit)
    unpacked = io.BufferedReader(_Pieces(unpacking.pieces(raw, path, settings.max_unpack_ratio)), unpacking.PIECE)
    lines = _lines(io.TextIOWrapper(unpacked, "utf-8-sig", "surrogateescape", newline=""), path, limit)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        column = _column(header, settings.field, path)
        for row in rows:
            if len(row) == len(header):
                yield row[column].encode("utf-8", "surrogateescape")
            elif row and settings.on_error == "skip":
                yield None
            elif row:
                raise UserError(
                    f"{path}:{rows.line_num} has {len(row)} columns and its header {len(header)}: mend the line (a text that holds "
                    "the separator must be quoted); or pass over such rows with --on-error skip"
                )
    except csv.Error as error:
        raise UserError(
            f"{path}:{rows.line_num} is no table that can be read: {error}: quote a text that holds quotes, and double these"
        ) from None


def _column(header: list[str], field: str, path: str) -> int:
    if header.count(field) != 1:
        found = f'{header.count(field)} columns "{field}"' if field in header else f'no column "{field}"'
        names = ", ".join(header).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        raise UserError(f"{path} has {found}: choose one with --field ({names[:500]})")
    return header.index(field)


def _lines(stream: io.TextIOWrapper, path: str, limit: int) -> Iterator[str]:
    while line := stream.readline(limit):
        if len(line) == limit:
            raise UserError(f"{path} has a line of more than {limit:,} characters, which no document may have: raise --max-chars")
        yield line


class _Pieces(io.RawIOBase):
    """A stream of pieces of bytes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._held = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._held = memoryview(piece)
        size = min(len(buffer), len(self._held))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size


def parquet_texts(raw: BinaryIO, path: str, settings: Settings, batch_bytes: int) -> Iterator[tuple[Texts, float]]:
    """Yield the texts of a .parquet file's column in batches of about ``batch_bytes``, and the share of the rows up to there.

    ``settings.field`` is a column, or ``a.b`` for the field b of a column of structs. A list of strings is one text, joined by line
    breaks.

    Raises:
        UserError: pyarrow is missing, the file is damaged, or it has no such column of strings.
    """
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'bitlm-dist[parquet]'") from None
    try:
        with _seekable(raw, path, settings) as whole:
            table = parquet.ParquetFile(whole, buffer_size=1 << 20, pre_buffer=False)
            keys = _parquet_column(table.schema_arrow, settings.field, path, arrow)
            rows, row = max(1, table.metadata.num_rows), 0
            stored = sum(table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups))
            batch_size = max(1, min(100_000, batch_bytes * rows // max(1, stored)))
            for batch in table.iter_batches(batch_size=batch_size, columns=[settings.field], use_threads=False):
                texts = _texts(batch.column(0), keys, arrow)
                row += len(texts)
                yield texts, row / rows
    except arrow.ArrowException as error:
        raise UserError(f"{path} is no Parquet file that can be read: {str(error).splitlines()[0]}") from None


@contextmanager
def _seekable(raw: BinaryIO, path: str, settings: Settings) -> Iterator[BinaryIO]:
    """The plain bytes of a file that is read from its end; a packed one is unpacked into a temporary file."""
    if not unpacking.packing_of(path):
        yield raw
        return
    with tempfile.TemporaryFile() as unpacked:
        for piece in unpacking.pieces(raw, path, settings.max_unpack_ratio):
            unpacked.write(piece)
        unpacked.seek(0)
        yield cast(BinaryIO, unpacked)


def _parquet_column(schema: Any, field: str, path: str, arrow: Any) -> list[str]:
    """Names of the structs' fields that lead from a column to its text; none for a column of text."""
    types = arrow.types
    keys: list[str] = []
    if field in schema.names:
        kind = schema.field(field).type
    else:
        first, *keys = field.split(".")
        kind = schema.field(first).type if first in schema.names else None
        for key in keys:
            kind = kind.field(key).type if kind is not None and types.is_struct(kind) and kind.get_field_index(key) >= 0 else None
    if kind is None:
        raise UserError(f'{path} has no column "{field}": choose one with --field ({", ".join(schema.names)})')
    text = kind
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        text = kind.value_type
    if types.is_dictionary(text):
        text = text.value_type
    if not (types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)):
        raise UserError(
            f'{path}: the column "{field}" holds {kind}, expected strings or lists of strings: choose another with --field'
        )
    return keys


def _texts(column: Any, keys: list[str], arrow: Any) -> Texts:
    compute = importlib.import_module("pyarrow.compute")
    if keys:
        column = compute.struct_field(column, keys)
    types = arrow.types
    if types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        column = compute.binary_join(column.cast(arrow.list_(arrow.string())), LIST_SEPARATOR)
    found: Texts = column.cast(arrow.large_binary()).to_pylist()
    return found
