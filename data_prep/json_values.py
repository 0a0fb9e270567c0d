"""The values of a .json file, which is an array of them, one alone, or one behind the other, with line breaks anywhere.

Each becomes a line, so that all that follows is as for .jsonl. A value is parsed to find its end, and once more by a worker.
"""

import codecs
import json
import re
from collections.abc import Iterator

from bitlm_dist.errors import UserError

# the worker reads the numbers; here 5,000 digits are no error either
_DECODER = json.JSONDecoder(parse_int=lambda digits: 0)
_BLANK = re.compile(r"[ \t\r\n]*")


def are_lines(head: bytes) -> bool:
    """Whether the first non-empty line of a .json file's beginning is a whole JSON object, as in .jsonl."""
    line, end, _ = head.lstrip().partition(b"\n")
    try:
        return bool(end) and isinstance(json.loads(line, parse_int=lambda digits: 0), dict)
    except (ValueError, RecursionError):
        return False


def values(pieces: Iterator[bytes], path: str, limit: int | None) -> Iterator[bytes]:
    """Yield each value of a file, spelled as there but on one line.

    Args:
        pieces: the file's bytes.
        path: for messages.
        limit: characters that a value may have; None: no limit.

    Raises:
        UserError: the file is not UTF-8, or at some place no JSON; names the place.
    """
    text = _Text(pieces, path, limit)
    text.skip_blank()
    in_array = text.next_is("[")
    if in_array:
        text.skip(1)
        text.skip_blank()
    while not text.at_end():
        if in_array and text.next_is("]"):
            text.skip(1)
            text.skip_blank()
            if not text.at_end():
                raise text.error("something follows the array")
            return
        yield text.value().replace("\n", " ").replace("\r", " ").encode()
        text.skip_blank()
        if in_array and text.next_is(","):
            text.skip(1)
            text.skip_blank()
            if text.next_is("]"):
                raise text.error("a value must follow the comma")
        elif in_array and not text.at_end() and not text.next_is("]"):
            raise text.error("expected , or ]")
    if in_array:
        raise text.error("the array does not end")


class _Text:
    """A file's text from some position on, read as it is asked for."""

    def __init__(self, pieces: Iterator[bytes], path: str, limit: int | None) -> None:
        self._pieces, self._path, self._limit = pieces, path, limit
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._held, self._position, self._ended = "", 0, False
        self._line, self._column = 1, 1  # of the first character held

    def _read(self, size: int) -> None:
        """Hold at least ``size`` characters behind the position, or all there are."""
        if len(self._held) - self._position >= size or self._ended:
            return
        self._line, self._column = self._place()
        parts, have = [self._held[self._position :]], len(self._held) - self._position
        while have < size and not self._ended:
            piece = next(self._pieces, None)
            self._ended = piece is None
            try:
                parts.append(self._decoder.decode(piece or b"", self._ended))
            except UnicodeDecodeError as error:
                raise UserError(f"{self._path} is not UTF-8 ({error.reason}): convert it first, e.g. with iconv") from None
            have += len(parts[-1])
        self._held, self._position = "".join(parts), 0

    def _place(self) -> tuple[int, int]:
        """Line and column of the position, from 1."""
        newline = self._held.rfind("\n", 0, self._position)
        if newline < 0:
            return self._line, self._column + self._position
        return self._line + self._held.count("\n", 0, self._position), self._position - newline

    def at_end(self) -> bool:
        self._read(1)
        return self._position == len(self._held)

    def next_is(self, character: str) -> bool:
        self._read(1)
        return self._held.startswith(character, self._position)

    def skip(self, count: int) -> None:
        self._position += count

    def skip_blank(self) -> None:
        while not self.at_end():
            found = _BLANK.match(self._held, self._position)
            assert found
            self._position = found.end()
            if self._position < len(self._held):
                return

    def value(self) -> str:
        """The value that begins here, as spelled."""
        size = 1 << 16
        while True:
            self._read(size)
            if self._limit is not None and size > 2 * self._limit:
                raise self.error(f"a value has more than {self._limit:,} characters: raise --max-chars")
            try:
                _, end = _DECODER.raw_decode(self._held, self._position)
            except RecursionError:
                raise self.error("a value is nested too deeply") from None
            except json.JSONDecodeError as error:
                if self._ended or not self._is_cut_off(error):
                    self._position = error.pos
                    raise self.error(error.msg) from None
            else:
                if self._ended or end < len(self._held):  # else a number might go on
                    value, self._position = self._held[self._position : end], end
                    return value
            size *= 2

    def _is_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether more text might mend an error: it is in a string without an end, or in the last word."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._held) - len("-Infinity")

    def error(self, what: str) -> UserError:
        line, column = self._place()
        return UserError(f"{self._path}:{line} is no JSON that can be read: {what} (column {column}): mend the file")
