"""Split a text into documents at a separator."""

import itertools
import re
from collections.abc import Iterable, Iterator

BOM = b"\xef\xbb\xbf"


def split_documents(
    separator: str, blocks: Iterable[bytes], max_bytes: int | None
) -> Iterator[bytes | None]:
    """Yield the non-blank documents of a text; None for one of more than ``max_bytes`` bytes.

    At most one document, or ``max_bytes`` bytes of it, is held in memory.

    Args:
        separator: Not empty; a line break in it also matches ``\\r\\n`` and ``\\r``.
        blocks: The text's bytes.
        max_bytes: Maximum size of a document; None: unlimited.
    """
    escaped = re.escape(separator.encode())
    pattern = re.compile(escaped.replace(re.escape(b"\n"), rb"(?:\r\n|\n|\r(?!\n))"))
    max_match_bytes = 2 * len(separator.encode()) + 1  # a match and the byte after it

    buffer = bytearray()
    skipping = False  # inside a document that is too long
    # The None at the end marks that no more bytes follow.
    for block in itertools.chain(blocks, [None]):
        # A separator may begin in the old bytes and end in the new ones.
        searched = max(0, len(buffer) - max_match_bytes)
        begin = 0
        buffer += block or b""
        for match in pattern.finditer(buffer, searched):
            if block is not None and match.end() == len(buffer):  # \n might follow its \r
                break

            text = bytes(buffer[begin : match.start()]).removeprefix(BOM)
            begin = match.end()
            if skipping or (max_bytes is not None and len(text) > max_bytes):
                yield None
            elif text and not text.isspace():
                yield text
            skipping = False

        del buffer[:begin]
        if max_bytes is not None and len(buffer) > max_bytes + max_match_bytes:
            del buffer[:-max_match_bytes]
            skipping = True

    if skipping or (max_bytes is not None and len(buffer) > max_bytes):
        yield None
        return

    text = bytes(buffer).removeprefix(BOM)
    if text and not text.isspace():
        yield text
