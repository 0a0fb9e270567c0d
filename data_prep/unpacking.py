"""The bytes of a plain or compressed file, piece by piece. A file that ends early is an error, never a shorter corpus.

A few kilobytes can unpack to terabytes. Two things bound that: no step unpacks more than about 128 MB, and a file that has given
more than ``BOMB_BYTES`` in all must not have given more than ``ratio`` times what was read of it. Text packs to a fifth, logs and
tables of numbers rarely to a fiftieth.
"""

import gzip
import importlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import zstandard

from bitlm_dist.errors import UserError

PACKED = (".gz", ".bz2", ".xz", ".zst")
PIECE = 1 << 20  # bytes read at a time
PACKED_PIECE = 1 << 15  # of compressed bytes
ZSTD_PIECE = 1 << 12  # its decoder knows no limit for a step; a block of 4 bytes can hold 128 kB
WINDOW = 1 << 31  # of zstd, and the dictionary of xz: bytes of memory that a file may ask for
RATIO = 200  # --max-unpack-ratio
BOMB_BYTES = 100_000_000  # a smaller file may unpack to any multiple of itself


def packing_of(name: str) -> str:
    """The suffix in ``PACKED`` that a file's name ends in, in whatever case; "" for a plain file."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix in PACKED else ""


def pieces(raw: BinaryIO, path: str, ratio: int = RATIO) -> Iterator[bytes]:
    """Yield what ``raw`` holds, unpacked as the suffix of ``path`` says.

    Args:
        raw: opened from ``path``, at its start.
        path: for the suffix and for messages.
        ratio: how many times its stored size a file may unpack to; 0: no bound.

    Raises:
        UserError, OSError, EOFError, zlib.error: the file is damaged, cut short, or unpacks beyond ``ratio``.
    """
    packing = packing_of(path)
    if not packing:
        yield from iter(lambda: raw.read(PIECE), b"")
        return
    given = 0
    for piece in _UNPACKERS[packing](raw, path):
        given += len(piece)
        if ratio and given > BOMB_BYTES and given > ratio * raw.tell():
            raise UserError(
                f"{path} unpacks to more than {ratio} times its size ({given / 1e6:,.0f} MB so far): remove it, "
                "or allow more with --max-unpack-ratio if it holds what you expect"
            )
        yield piece
    if not raw.tell():
        raise UserError(f"{path} is cut short: it has no bytes, which is no {packing} file")


def _gzip(raw: BinaryIO, path: str) -> Iterator[bytes]:
    stream = gzip.GzipFile(fileobj=raw, mode="rb")
    yield from iter(lambda: stream.read(PIECE), b"")


def _zstd(raw: BinaryIO, path: str) -> Iterator[bytes]:
    """Frame after frame: tools that pack in parallel write many, and the library's own stream stops silently after the first."""
    packer = zstandard.ZstdDecompressor(max_window_size=WINDOW)
    frame = None
    try:
        while block := raw.read(ZSTD_PIECE):
            while block:
                if frame is None or frame.eof:
                    frame = packer.decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if frame is not None and not frame.eof:
        raise UserError(f"{path} is cut short: it ends inside a zstd frame")


def _bz2(raw: BinaryIO, path: str) -> Iterator[bytes]:
    return _streams(raw, path, _module("bz2", path).BZ2Decompressor, (OSError, EOFError))


def _xz(raw: BinaryIO, path: str) -> Iterator[bytes]:
    lzma = _module("lzma", path)
    return _streams(
        raw, path, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=WINDOW), (lzma.LZMAError, EOFError), padding=b"\0"
    )


def _streams(
    raw: BinaryIO, path: str, make: Callable[[], Any], errors: tuple[type[Exception], ...], padding: bytes = b""
) -> Iterator[bytes]:
    """Stream after stream; the modules' own files take a damaged second stream for the end, and say nothing.

    ``padding`` may lie between two streams.
    """
    stream = None
    while block := raw.read(PACKED_PIECE):
        while block or (stream is not None and not stream.eof and not stream.needs_input):
            if stream is None or stream.eof:
                block = block.lstrip(padding) if stream is not None else block
                if not block:
                    break
                stream = make()
            try:
                piece = stream.decompress(block, PIECE)
            except errors as error:
                raise UserError(f"{path} is damaged: {error}") from None
            block = stream.unused_data if stream.eof else b""
            yield piece
    if stream is not None and not stream.eof:
        raise UserError(f"{path} is cut short: it ends inside a compressed stream")


def _module(name: str, path: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{path}: this Python was built without {name}: unpack the file first, or use another Python") from None


_UNPACKERS: dict[str, Callable[[BinaryIO, str], Iterator[bytes]]] = {
    ".gz": _gzip,
    ".bz2": _bz2,
    ".xz": _xz,
    ".zst": _zstd,
}
