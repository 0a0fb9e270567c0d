"""Streaming decompression of input files. A truncated file is an error, never a shorter corpus.

A few kilobytes can unpack to terabytes. Two limits prevent that. No step unpacks more than about
128 MB. And once a file has unpacked to more than ``BOMB_BYTES``, the output must not exceed
``max_ratio`` times the input read so far. Text is typically compressed to a fifth of its size, logs
and numeric tables rarely to less than a fiftieth.
"""

import gzip
import importlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import zstandard

from bitlm_dist.errors import UserError

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
READ_BYTES = 1 << 20  # per read
COMPRESSED_READ_BYTES = 1 << 15  # per read of a compressed file

# The zstd decoder has no limit for the output of a step, and 4 bytes of input can hold 128 kB.
ZSTD_READ_BYTES = 1 << 12

# Memory that a file may demand: the window of zstd, the dictionary of xz.
MAX_WINDOW_BYTES = 1 << 31
MAX_UNPACK_RATIO = 200  # --max-unpack-ratio
BOMB_BYTES = 100_000_000  # a smaller file may unpack to any multiple of itself


def compression_suffix(name: str) -> str:
    """Return the compression suffix of a file name in lower case, or "" for a plain file.

    It is one of ``COMPRESSED_SUFFIXES``; case is ignored.
    """
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix in COMPRESSED_SUFFIXES else ""


def decompressed_blocks(
    raw: BinaryIO, path: str, max_ratio: int = MAX_UNPACK_RATIO
) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed according to the suffix of ``path``.

    Args:
        raw: file opened from ``path``, at its start.
        path: name of the file, for its suffix and for messages.
        max_ratio: maximum ratio of unpacked to compressed size; 0: unlimited.

    Raises:
        UserError: The file is damaged, truncated, or unpacks beyond ``max_ratio``.
        OSError, EOFError, zlib.error: A .gz file is damaged or truncated, or a file cannot be read.
    """
    suffix = compression_suffix(path)
    if not suffix:
        yield from iter(lambda: raw.read(READ_BYTES), b"")
        return

    # raw.tell() is the number of compressed bytes read so far.
    num_bytes = 0
    for block in _DECOMPRESSORS[suffix](raw, path):
        num_bytes += len(block)
        if max_ratio and num_bytes > BOMB_BYTES and num_bytes > max_ratio * raw.tell():
            raise UserError(
                f"{path} unpacks to more than {max_ratio} times its size "
                f"({num_bytes / 1e6:,.0f} MB so far): remove it, "
                "or allow more with --max-unpack-ratio if it holds what you expect"
            )
        yield block

    # An empty file is no stream at all, but no decoder complains.
    if not raw.tell():
        raise UserError(f"{path} is cut short: it has no bytes, which is no {suffix} file")


def _gzip(raw: BinaryIO, path: str) -> Iterator[bytes]:
    stream = gzip.GzipFile(fileobj=raw, mode="rb")
    yield from iter(lambda: stream.read(READ_BYTES), b"")


def _zstd(raw: BinaryIO, path: str) -> Iterator[bytes]:
    """Decompress all zstd frames.

    Tools that compress in parallel write many frames, and the library's own stream reader stops
    silently after the first.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    frame = None

    # One input block may hold the end of a frame and the beginning of the next.
    try:
        while block := raw.read(ZSTD_READ_BYTES):
            while block:
                if frame is None or frame.eof:
                    frame = decompressor.decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is damaged: {error}") from None

    if frame is not None and not frame.eof:
        raise UserError(f"{path} is cut short: it ends inside a zstd frame")


def _bz2(raw: BinaryIO, path: str) -> Iterator[bytes]:
    return _decompress_streams(raw, path, _module("bz2", path).BZ2Decompressor, (OSError, EOFError))


def _xz(raw: BinaryIO, path: str) -> Iterator[bytes]:
    lzma = _module("lzma", path)
    return _decompress_streams(
        raw,
        path,
        lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW_BYTES),
        (lzma.LZMAError, EOFError),
        padding=b"\0",
    )


def _decompress_streams(
    raw: BinaryIO,
    path: str,
    make: Callable[[], Any],
    errors: tuple[type[Exception], ...],
    padding: bytes = b"",
) -> Iterator[bytes]:
    """Decompress all concatenated streams.

    The file classes of the standard library silently take a damaged second stream for the end.

    Args:
        raw: compressed file, at its start.
        path: name of the file, for messages.
        make: constructor of a decompressor for one stream.
        errors: exceptions that a decompressor raises for damaged input.
        padding: bytes that may separate two streams.
    """
    stream = None
    while block := raw.read(COMPRESSED_READ_BYTES):
        while block or (stream is not None and not stream.eof and not stream.needs_input):
            if stream is None or stream.eof:
                # The rest of the input is the next stream, or only padding.
                block = block.lstrip(padding) if stream is not None else block
                if not block:
                    break
                stream = make()

            try:
                output = stream.decompress(block, READ_BYTES)
            except errors as error:
                raise UserError(f"{path} is damaged: {error}") from None

            block = stream.unused_data if stream.eof else b""
            yield output

    if stream is not None and not stream.eof:
        raise UserError(f"{path} is cut short: it ends inside a compressed stream")


def _module(name: str, path: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{path}: this Python was built without {name}: "
            "unpack the file first, or use another Python"
        ) from None


_DECOMPRESSORS: dict[str, Callable[[BinaryIO, str], Iterator[bytes]]] = {
    ".gz": _gzip,
    ".bz2": _bz2,
    ".xz": _xz,
    ".zst": _zstd,
}
