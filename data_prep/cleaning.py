"""Unicode NFC, one kind of line end, no control characters: what every text goes through before anything looks at it.

Cleaning twice is cleaning once, and text that is clean keeps every byte.
"""

import re
import unicodedata
from collections import Counter

DROPPED = bytes(code for code in (*range(32), 127) if code not in b"\t\n")  # of ASCII; \r\n and \r became \n before
LATIN_CONTROL = re.compile(r"[\x80-\x9f]")


def clean(text: str, counts: Counter[str]) -> tuple[str, bytes]:
    """``text`` cleaned, and the same as UTF-8; ``counts`` gets what was changed.

    \\r\\n and a lone \\r become \\n; of the control characters (Unicode Cc) only \\n and \\t stay; then NFC.

    Counts: ``line_ends`` replaced, ``control_characters`` dropped, ``normalized`` documents that were not NFC.

    Raises:
        UnicodeEncodeError: a lone surrogate, which JSON can spell and no text can hold.
    """
    raw = text.encode()
    if b"\r" in raw:
        counts["line_ends"] += raw.count(b"\r")
        raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        text = raw.decode()
    kept = raw.translate(None, DROPPED)  # no byte of a longer character is below 128
    if len(kept) != len(raw):
        counts["control_characters"] += len(raw) - len(kept)
        text = kept.decode()
    return (text, kept) if kept.isascii() else _clean_beyond_ascii(text, kept, counts)


def _clean_beyond_ascii(text: str, raw: bytes, counts: Counter[str]) -> tuple[str, bytes]:
    cleaned = text
    if b"\xc2" in raw and (found := len(LATIN_CONTROL.findall(text))):  # U+0080 to U+009F are C2 80 to C2 9F
        counts["control_characters"] += found
        cleaned = LATIN_CONTROL.sub("", text)
    if not unicodedata.is_normalized("NFC", cleaned):
        counts["normalized"] += 1
        cleaned = unicodedata.normalize("NFC", cleaned)
    return cleaned, (raw if cleaned is text else cleaned.encode())
