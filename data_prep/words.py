"""Split text into words, for everything that compares texts by them.

Most scripts separate words by spaces. Chinese, Japanese, Thai, Lao, Khmer, Burmese and related
scripts use few or none: a page would be a handful of words, and texts that differ in a single
character would share none. In these scripts a character is a word, together with the vowel signs
and tone marks written on it. In a text of several scripts, each part is split by the rule of its
script.
"""

import re

# Unicode scripts without spaces or marks between words (line breaking classes ID and SA), and
# Tibetan, which marks syllables.
UNSPACED = (
    "\u0e01-\u0e5b\u0e81-\u0edf"  # Thai, Lao
    "\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Tibetan, Myanmar, Khmer
    "\u1950-\u19df\u1a20-\u1aaf"  # Tai Le, New Tai Lue, Tai Tham
    "\ua9e0-\ua9ff\uaa60-\uaadf"  # Myanmar extended, Tai Viet
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c"  # 々 and other signs among Han
    "\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana, Bopomofo
    "\u2e80-\u2fd5\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Han
    "\ua000-\ua48c"  # Yi
    "\U0001aff0-\U0001b16f\U00020000-\U0003fffd"  # Kana and Han beyond the first plane
)
MARKS = (
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"
    "\u0f71-\u0f84\u0f8d-\u0fbc\u102b-\u103e\u1056-\u1059\u105e-\u1060\u1062-\u1064"
    "\u1067-\u106d\u1071-\u1074\u1082-\u108d"
    "\u17b4-\u17d3\u17dd\u1a55-\u1a7f\u3099\u309a"
)
_CLUSTER = f"[{UNSPACED}][{MARKS}]*"
_UNSPACED = re.compile(f"[{UNSPACED}]")
_SPLIT = re.compile(rf"{_CLUSTER}|[^\s{UNSPACED}]+")
# First bytes in UTF-8 of all of these characters except Han radicals. No curly quote or dash
# begins with one.
_FIRST_BYTES = frozenset((0xE0, 0xE1, *range(0xE3, 0xEB), 0xEF, 0xF0))
_OTHER_BYTES = bytes(byte for byte in range(256) if byte not in _FIRST_BYTES)
_WORD = re.compile(r"\w+")
_WORD_OR_CHARACTER = re.compile(rf"(?=\w){_CLUSTER}|[^\W{UNSPACED}]+")


def split_at_whitespace(text: str) -> list[str]:
    """Split a text at whitespace, lower-cased; punctuation stays attached to its word."""
    lower = text.lower()
    return _SPLIT.findall(lower) if _has_unspaced(lower) else lower.split()


def find_words(text: str) -> list[str]:
    """Find the words of a text, lower-cased: runs of letters, digits and underscores."""
    lower = text.lower()
    return (_WORD_OR_CHARACTER if _has_unspaced(lower) else _WORD).findall(lower)


def _has_unspaced(text: str) -> bool:
    # Looking for the bytes first is five times as fast as the search.
    if text.isascii() or not text.encode().translate(None, _OTHER_BYTES):
        return False
    return _UNSPACED.search(text) is not None
