"""Many documents in one text, with a separator between two."""

import itertools
import re
from collections.abc import Iterable, Iterator

BOM = b"\xef\xbb\xbf"


def documents_between(separator: str, pieces: Iterable[bytes], limit: int | None) -> Iterator[bytes | None]:
    """Yield the documents of a text, but for blank ones; None for one of more than ``limit`` bytes.

    No more than a document, or ``limit`` bytes of it, is held in memory.

    Args:
        separator: not empty; a line break in it stands for ``\\r\\n`` and ``\\r`` as well.
        pieces: the text's bytes.
        limit: None: no limit.
    """
    escaped = re.escape(separator.encode())
    pattern = re.compile(escaped.replace(re.escape(b"\n"), rb"(?:\r\n|\n|\r(?!\n))"))
    longest = 2 * len(separator.encode()) + 1  # of a match, and the byte behind it
    held, skipping = bytearray(), False
    for piece in itertools.chain(pieces, [None]):
        searched, begin = max(0, len(held) - longest), 0
        held += piece or b""
        for match in pattern.finditer(held, searched):
            if piece is not None and match.end() == len(held):  # \n might follow its \r
                break
            text, begin = bytes(held[begin : match.start()]).removeprefix(BOM), match.end()
            if skipping or (limit is not None and len(text) > limit):
                yield None
            elif text and not text.isspace():
                yield text
            skipping = False
        del held[:begin]
        if limit is not None and len(held) > limit + longest:
            del held[:-longest]
            skipping = True
    if skipping or (limit is not None and len(held) > limit):
        yield None
        return
    text = bytes(held).removeprefix(BOM)
    if text and not text.isspace():
        yield text
