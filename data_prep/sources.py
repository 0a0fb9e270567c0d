"""Documents from files: .txt (one document a file) and .jsonl (one a line, field "text"), plain or compressed (.gz, .zst)."""

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from bitlm_dist.errors import UserError

SUFFIXES = (".txt", ".jsonl")


def find_files(sources: Iterable[Path]) -> list[Path]:
    """The text files among ``sources``; folders are searched in sorted order.

    Raises:
        UserError: a source does not exist, is of another kind, or a folder holds no text file.
    """
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.is_file() and _kind(path))
            if not inside:
                raise UserError(f"{source} holds no {' or '.join(SUFFIXES)} file (plain, .gz or .zst)")
            files += inside
        elif not source.exists():
            raise UserError(f"{source} does not exist")
        elif not _kind(source):
            raise UserError(f"{source} is none of {', '.join(SUFFIXES)} (plain, .gz or .zst)")
        else:
            files.append(source)
    return files


def documents(file: Path) -> Iterator[str]:
    """The non-empty documents of one file, in order.

    Raises:
        UserError: text that is not UTF-8, or a line that is no JSON object with a string "text"; names file and place.
    """
    kind = _kind(file)
    if kind == ".txt":
        with _open(file) as stream:
            text = _decode(stream.read(), f"{file}")
        if text.strip():
            yield text
        return
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                text = _text_of(line, f"{file}:{number}")
                if text.strip():
                    yield text


def _kind(file: Path) -> str | None:
    suffixes = [s for s in file.suffixes if s not in (".gz", ".zst")]
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _open(file: Path) -> io.BufferedReader:
    if file.suffix == ".gz":
        return io.BufferedReader(gzip.open(file))  # type: ignore[arg-type]
    if file.suffix == ".zst":
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file.open("rb"), closefd=True))
    return file.open("rb")


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x}): convert it first, e.g. with iconv"
        ) from None


def _text_of(line: bytes, where: str) -> str:
    decoded = _decode(line, where)
    try:
        text = json.loads(decoded)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f'{where} is no JSON object with a field "text"') from None
    if not isinstance(text, str):
        raise UserError(f'{where}: the field "text" is a {type(text).__name__}, expected a string')
    return text
