"""Streaming parser for the values of a .json file.

A file is an array of values, a single value, or several values one after another, with line breaks
anywhere. Each value becomes one line, so that all later steps are the same as for .jsonl. Values
are parsed here only to find their ends; a worker parses them again.
"""

import codecs
import json
import re
from collections.abc import Iterator

from bitlm_dist.errors import UserError

# int() refuses numbers of several thousand digits, and values of numbers are not needed here.
_DECODER = json.JSONDecoder(parse_int=lambda digits: 0)
_BLANK = re.compile(r"[ \t\r\n]*")


def is_jsonl(head: bytes) -> bool:
    """Return True if the first non-empty line of a .json file is a complete object, as in .jsonl.

    Args:
        head: beginning of the file.
    """
    line, end, _ = head.lstrip().partition(b"\n")
    try:
        return bool(end) and isinstance(json.loads(line, parse_int=lambda digits: 0), dict)
    except (ValueError, RecursionError):
        return False


def iter_values(blocks: Iterator[bytes], path: str, limit: int | None) -> Iterator[bytes]:
    """Yield each value of a file, spelled as in the file but on one line.

    Args:
        blocks: content of the file in blocks of bytes.
        path: name of the file, for messages.
        limit: maximum number of characters per value; None: unlimited.

    Raises:
        UserError: The file is not UTF-8 or not JSON. The message has line and column.
    """
    buffer = _TextBuffer(blocks, path, limit)
    buffer.skip_whitespace()

    # Inside an array, values are separated by commas; outside, by white space or nothing.
    in_array = buffer.next_is("[")
    if in_array:
        buffer.skip(1)
        buffer.skip_whitespace()

    while not buffer.at_end():
        if in_array and buffer.next_is("]"):
            buffer.skip(1)
            buffer.skip_whitespace()
            if not buffer.at_end():
                raise buffer.error("something follows the array")
            return

        # A line break can only be white space between tokens: in strings, JSON escapes it.
        yield buffer.next_value().replace("\n", " ").replace("\r", " ").encode()
        buffer.skip_whitespace()

        if in_array and buffer.next_is(","):
            buffer.skip(1)
            buffer.skip_whitespace()
            if buffer.next_is("]"):
                raise buffer.error("a value must follow the comma")
        elif in_array and not buffer.at_end() and not buffer.next_is("]"):
            raise buffer.error("expected , or ]")

    if in_array:
        raise buffer.error("the array does not end")


class _TextBuffer:
    """Text of a file from the current position on, read on demand.

    Args:
        blocks: content of the file in blocks of bytes.
        path: name of the file, for messages.
        limit: maximum number of characters per value; None: unlimited.
    """

    def __init__(self, blocks: Iterator[bytes], path: str, limit: int | None) -> None:
        self._blocks = blocks
        self._path = path
        self._limit = limit
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer = ""
        self._position = 0
        self._is_exhausted = False

        # Line and column of the first character in the buffer.
        self._line = 1
        self._column = 1

    def _fill(self, size: int) -> None:
        """Buffer at least ``size`` characters from the position on, or all that are left."""
        if len(self._buffer) - self._position >= size or self._is_exhausted:
            return

        # Drop the text before the position.
        self._line, self._column = self._line_and_column()
        parts = [self._buffer[self._position :]]
        num_characters = len(self._buffer) - self._position
        while num_characters < size and not self._is_exhausted:
            block = next(self._blocks, None)
            self._is_exhausted = block is None
            try:
                parts.append(self._decoder.decode(block or b"", self._is_exhausted))
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self._path} is not UTF-8 ({error.reason}): convert it first, e.g. with iconv"
                ) from None
            num_characters += len(parts[-1])

        self._buffer = "".join(parts)
        self._position = 0

    def _line_and_column(self) -> tuple[int, int]:
        """Return line and column of the position, both counted from 1."""
        newline = self._buffer.rfind("\n", 0, self._position)
        if newline < 0:
            return self._line, self._column + self._position
        return self._line + self._buffer.count("\n", 0, self._position), self._position - newline

    def at_end(self) -> bool:
        """Return True if no text is left."""
        self._fill(1)
        return self._position == len(self._buffer)

    def next_is(self, character: str) -> bool:
        """Return True if the next character is ``character``."""
        self._fill(1)
        return self._buffer.startswith(character, self._position)

    def skip(self, count: int) -> None:
        """Advance by ``count`` characters."""
        self._position += count

    def skip_whitespace(self) -> None:
        """Advance to the next character that is not white space."""
        # Repeated, as white space may go on in the next block.
        while not self.at_end():
            match = _BLANK.match(self._buffer, self._position)
            assert match
            self._position = match.end()
            if self._position < len(self._buffer):
                return

    def next_value(self) -> str:
        """Return the value at the position, as spelled, and advance past it."""
        # The text is parsed again with twice as much of it until the value is complete.
        size = 1 << 16
        while True:
            self._fill(size)
            if self._limit is not None and size > 2 * self._limit:
                raise self.error(
                    f"a value has more than {self._limit:,} characters: raise --max-chars"
                )

            try:
                _, end = _DECODER.raw_decode(self._buffer, self._position)
            except RecursionError:
                raise self.error("a value is nested too deeply") from None
            except json.JSONDecodeError as error:
                if self._is_exhausted or not self._is_cut_off(error):
                    self._position = error.pos
                    raise self.error(error.msg) from None
            else:
                # A number at the end of the buffer may go on in the next block.
                if self._is_exhausted or end < len(self._buffer):
                    value = self._buffer[self._position : end]
                    self._position = end
                    return value

            size *= 2

    def _is_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Return True if the error may be due to the end of the buffer.

        It is in an unterminated string or in the last word.
        """
        # -Infinity is the longest word of JSON as Python reads it.
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - len(
            "-Infinity"
        )

    def error(self, what: str) -> UserError:
        """Make an error with the line and column of the position."""
        line, column = self._line_and_column()
        return UserError(
            f"{self._path}:{line} is no JSON that can be read: {what} (column {column}): "
            "mend the file"
        )
