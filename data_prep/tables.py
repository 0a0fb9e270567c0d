"""Read a column of text from .parquet, .csv and .tsv files, row by row."""

import csv
import importlib
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from typing_extensions import override

from bitlm_dist.data_prep import decompression
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.errors import UserError

LIST_SEPARATOR = "\n"  # between the strings of a list that is one document

Texts = list[bytes | None]  # None: a row without text


def csv_texts(
    raw: BinaryIO, path: str, settings: Settings, delimiter: str, max_characters: int
) -> Iterator[bytes | None]:
    """Yield the text of each row of a .csv or .tsv file with a header, quoted as in RFC 4180.

    Empty lines are not rows. Bytes that are not UTF-8 are yielded unchanged.

    Args:
        raw: The opened file.
        path: Its path, for its compression and for messages.
        settings: Settings with the name of the column and the handling of bad rows.
        delimiter: Character between two columns.
        max_characters: Maximum length of a line or a field.

    Raises:
        UserError: The column is missing or occurs twice; the quoting is broken; or, unless bad
            lines are skipped, a row has more or fewer columns than the header.
    """
    # A global setting of the csv module, whose default is only 131,072 characters.
    csv.field_size_limit(max_characters)
    unpacked = io.BufferedReader(
        _BlockStream(decompression.decompressed_blocks(raw, path, settings.max_unpack_ratio)),
        decompression.READ_BYTES,
    )
    # newline="": the csv module must see line breaks inside quotes unchanged.
    lines = _bounded_lines(
        io.TextIOWrapper(unpacked, "utf-8-sig", "surrogateescape", newline=""), path, max_characters
    )
    rows = csv.reader(lines, delimiter=delimiter, strict=True)

    try:
        header = next(rows, None)
        if header is None:
            return

        column = _column_index(header, settings.field, path)
        for row in rows:
            if len(row) == len(header):
                yield row[column].encode("utf-8", "surrogateescape")
            elif row and settings.on_error == "skip":
                yield None
            elif row:
                raise UserError(
                    f"{path}:{rows.line_num} has {len(row)} columns and its header {len(header)}: "
                    "mend the line (a text that holds the separator must be quoted); "
                    "or pass over such rows with --on-error skip"
                )
    except csv.Error as error:
        raise UserError(
            f"{path}:{rows.line_num} is no table that can be read: {error}: "
            "quote a text that holds quotes, and double these"
        ) from None


def _column_index(header: list[str], field: str, path: str) -> int:
    if header.count(field) != 1:
        problem = (
            f'{header.count(field)} columns "{field}"'
            if field in header
            else f'no column "{field}"'
        )
        # The header may hold bytes that are not UTF-8, which a message cannot.
        names = ", ".join(header).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        raise UserError(f"{path} has {problem}: choose one with --field ({names[:500]})")

    return header.index(field)


def _bounded_lines(stream: io.TextIOWrapper, path: str, max_characters: int) -> Iterator[str]:
    """Yield lines; an endless one must not fill the memory."""
    while line := stream.readline(max_characters):
        if len(line) == max_characters:
            raise UserError(
                f"{path} has a line of more than {max_characters:,} characters, "
                "which no document may have: raise --max-chars"
            )
        yield line


class _BlockStream(io.RawIOBase):
    """Wraps an iterator of byte blocks as a raw stream."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._buffer = memoryview(b"")

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Any) -> int:
        while not self._buffer:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._buffer = memoryview(block)

        size = min(len(buffer), len(self._buffer))
        buffer[:size] = self._buffer[:size]
        self._buffer = self._buffer[size:]
        return size


def parquet_texts(
    raw: BinaryIO, path: str, settings: Settings, batch_bytes: int
) -> Iterator[tuple[Texts, float]]:
    """Yield the texts of a .parquet file's column in batches.

    ``settings.field`` is a column, or ``a.b`` for the field b of a column of structs. The strings
    of a list are joined by line breaks into one text.

    Args:
        raw: The opened file.
        path: Its path, for its compression and for messages.
        settings: Settings with the name of the column.
        batch_bytes: Approximate size of a batch.

    Yields:
        The texts of a batch, and the fraction of all rows up to its end.

    Raises:
        UserError: pyarrow is missing, the file is damaged, or it has no such column of strings.
    """
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(
            f"{path}: reading Parquet needs pyarrow: pip install 'bitlm-dist[parquet]'"
        ) from None

    try:
        with _seekable(raw, path, settings) as seekable:
            table = parquet.ParquetFile(seekable, buffer_size=1 << 20, pre_buffer=False)
            keys = _parquet_column(table.schema_arrow, settings.field, path, arrow)

            # Batches are counted in rows, so their size follows from the average row.
            num_rows = max(1, table.metadata.num_rows)
            num_rows_read = 0
            total_bytes = sum(
                table.metadata.row_group(i).total_byte_size
                for i in range(table.metadata.num_row_groups)
            )
            batch_size = max(1, min(100_000, batch_bytes * num_rows // max(1, total_bytes)))

            for batch in table.iter_batches(
                batch_size=batch_size, columns=[settings.field], use_threads=False
            ):
                texts = _texts_of_column(batch.column(0), keys, arrow)
                num_rows_read += len(texts)
                yield texts, num_rows_read / num_rows
    except arrow.ArrowException as error:
        raise UserError(
            f"{path} is no Parquet file that can be read: {str(error).splitlines()[0]}"
        ) from None


@contextmanager
def _seekable(raw: BinaryIO, path: str, settings: Settings) -> Iterator[BinaryIO]:
    """Yield a seekable stream of a file; a compressed one is unpacked into a temporary file."""
    if not decompression.compression_suffix(path):
        yield raw
        return

    with tempfile.TemporaryFile() as unpacked:
        for block in decompression.decompressed_blocks(raw, path, settings.max_unpack_ratio):
            unpacked.write(block)
        unpacked.seek(0)
        yield cast(BinaryIO, unpacked)


def _parquet_column(schema: Any, field: str, path: str, arrow: Any) -> list[str]:
    """Find the column of text and check its type.

    Returns:
        Names of the struct fields that lead from the column to its text; empty if the column
        itself holds the text.
    """
    types = arrow.types
    keys: list[str] = []
    # A column whose name contains a dot takes precedence over a path into a struct.
    if field in schema.names:
        column_type = schema.field(field).type
    else:
        first, *keys = field.split(".")
        column_type = schema.field(first).type if first in schema.names else None
        for key in keys:
            column_type = (
                column_type.field(key).type
                if column_type is not None
                and types.is_struct(column_type)
                and column_type.get_field_index(key) >= 0
                else None
            )

    if column_type is None:
        raise UserError(
            f'{path} has no column "{field}": choose one with --field ({", ".join(schema.names)})'
        )

    # Strings may be inside lists, and dictionary-encoded.
    text_type = column_type
    if (
        types.is_list(column_type)
        or types.is_large_list(column_type)
        or types.is_fixed_size_list(column_type)
    ):
        text_type = column_type.value_type
    if types.is_dictionary(text_type):
        text_type = text_type.value_type

    if not (
        types.is_string(text_type)
        or types.is_large_string(text_type)
        or types.is_string_view(text_type)
    ):
        raise UserError(
            f'{path}: the column "{field}" holds {column_type}, '
            "expected strings or lists of strings: choose another with --field"
        )

    return keys


def _texts_of_column(column: Any, keys: list[str], arrow: Any) -> Texts:
    """Convert a column to UTF-8 texts."""
    compute = importlib.import_module("pyarrow.compute")
    if keys:
        column = compute.struct_field(column, keys)

    types = arrow.types
    if (
        types.is_list(column.type)
        or types.is_large_list(column.type)
        or types.is_fixed_size_list(column.type)
    ):
        column = compute.binary_join(column.cast(arrow.list_(arrow.string())), LIST_SEPARATOR)

    found: Texts = column.cast(arrow.large_binary()).to_pylist()
    return found
