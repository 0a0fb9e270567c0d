"""Text cleaning: Unicode NFC, uniform line ends, no control characters.

Every text is cleaned before any other step sees it. Cleaning is idempotent, and clean text keeps
every byte.
"""

import re
import unicodedata
from collections import Counter

# ASCII control characters but tab and newline. \r\n and \r have become \n before these are dropped.
DROPPED_BYTES = bytes(code for code in (*range(32), 127) if code not in b"\t\n")
LATIN_CONTROL = re.compile(r"[\x80-\x9f]")


def clean(text: str, counts: Counter[str]) -> tuple[str, bytes]:
    """Clean a text.

    \\r\\n and a lone \\r become \\n. Of the control characters (Unicode category Cc), only \\n and
    \\t stay. Then the text is normalized to NFC.

    Args:
        text: text of a document.
        counts: counters to update: ``line_ends`` replaced, ``control_characters`` dropped, and
            ``normalized`` documents that were not NFC.

    Returns:
        The cleaned text, and the same as UTF-8.

    Raises:
        UnicodeEncodeError: The text has a lone surrogate, which JSON can spell but no encoding can
            represent.
    """
    raw = text.encode()
    if b"\r" in raw:
        counts["line_ends"] += raw.count(b"\r")
        raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        text = raw.decode()

    # On bytes, which is faster: no byte of a multi-byte character is below 128.
    kept = raw.translate(None, DROPPED_BYTES)
    if len(kept) != len(raw):
        counts["control_characters"] += len(raw) - len(kept)
        text = kept.decode()

    # ASCII is always NFC.
    return (text, kept) if kept.isascii() else _clean_non_ascii(text, kept, counts)


def _clean_non_ascii(text: str, raw: bytes, counts: Counter[str]) -> tuple[str, bytes]:
    """Drop the control characters U+0080 to U+009F and normalize to NFC."""
    cleaned = text

    # These characters are C2 80 to C2 9F in UTF-8; most texts have no byte C2.
    if b"\xc2" in raw and (num_controls := len(LATIN_CONTROL.findall(text))):
        counts["control_characters"] += num_controls
        cleaned = LATIN_CONTROL.sub("", text)

    if not unicodedata.is_normalized("NFC", cleaned):
        counts["normalized"] += 1
        cleaned = unicodedata.normalize("NFC", cleaned)
    return cleaned, (raw if cleaned is text else cleaned.encode())
