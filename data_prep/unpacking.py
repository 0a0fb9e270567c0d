"""The bytes of a plain, .gz or .zst file, piece by piece. A file that ends early is an error, never a shorter corpus."""

import gzip
from collections.abc import Iterator
from typing import BinaryIO

import zstandard

from bitlm_dist.errors import UserError

PIECE = 1 << 20  # bytes read at a time
PACKED_PIECE = 1 << 15  # of zstd; little enough that a piece of very regular text does not unpack to much


def pieces(raw: BinaryIO, path: str) -> Iterator[bytes]:
    """What ``raw``, opened from ``path``, holds.

    Raises:
        UserError, OSError, EOFError, zlib.error: it is damaged or cut short.
    """
    if path.endswith(".zst"):
        yield from _zstd(raw, path)
        return
    stream = gzip.GzipFile(fileobj=raw, mode="rb") if path.endswith(".gz") else raw
    while piece := stream.read(PIECE):
        yield piece


def _zstd(raw: BinaryIO, path: str) -> Iterator[bytes]:
    """Frame after frame: tools that pack in parallel write many, and the library's own stream stops silently after the first."""
    packer = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    try:
        while block := raw.read(PACKED_PIECE):
            while block:
                if frame is None or frame.eof:
                    frame = packer.decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if frame is not None and not frame.eof:
        raise UserError(f"{path} is cut short: it ends inside a zstd frame")
