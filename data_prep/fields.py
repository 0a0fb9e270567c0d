"""The text of one document in the bytes of a line, or why there is none."""

import json
import re
from collections import Counter
from typing import Any

from bitlm_dist.data_prep.tables import LIST_SEPARATOR

_DOUBLED: Any = object()  # a key that no JSON has


class BadLineError(Exception):
    """Carries why a line is no document: one of :data:`~bitlm_dist.data_prep.reading.BAD`, and a message to go behind its place."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode(raw: bytes | None) -> str:
    """The text of UTF-8 bytes.

    Raises:
        BadLineError: they are none, or there are none.
    """
    if raw is None:
        raise _bad("no_text", "is null, expected text")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _bad(
            "not_utf8", f"is not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x}): convert it first, e.g. with iconv"
        ) from None


def _bad(reason: str, message: str) -> BadLineError:
    return BadLineError(reason, f"{message}; or pass over such documents with --on-error skip")


class Field:
    """Finds the text in a line of JSON: a string, or a list of strings, which are joined by line breaks.

    Args:
        name: a key of the object, or ``a.b`` for the key b of the object a.
    """

    def __init__(self, name: str) -> None:
        self._name, self._keys = name, name.split(".")
        self._quoted = f'"{self._keys[-1]}"'
        self._twice = re.compile(re.escape(self._quoted) + r"\s*:")

    def text_of(self, line: bytes) -> str:
        """The text.

        Raises:
            BadLineError: there is none.
        """
        decoded = decode(line)
        document = _object_of(decoded)
        if decoded.count(self._quoted) > 1 and len(self._twice.findall(decoded)) > 1:
            self._refuse_doubled(decoded)
        text = document[self._name] if self._name in document else self._nested(document)
        if isinstance(text, list) and all(isinstance(part, str) for part in text):
            text = LIST_SEPARATOR.join(text)
        if not isinstance(text, str):
            raise _bad(
                "no_text", f'has a {type(text).__name__} in its field "{self._name}", expected a string or a list of strings'
            )
        if not text.isascii() and _has_surrogate(text):
            raise _bad("not_utf8", "spells half a character (a lone surrogate): mend the line")
        return text

    def _nested(self, document: dict[str, Any]) -> Any:
        value: Any = document
        for key in self._keys:
            if not isinstance(value, dict) or key not in value:
                raise _bad("no_text", f'is a JSON object without a field "{self._name}": name the right one with --field')
            value = value[key]
        return value

    def _refuse_doubled(self, decoded: str) -> None:
        """Raise if a key on the way to the text is in its object twice, of which JSON's readers keep the last without a word."""

        def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
            made = dict(found)
            if len(made) < len(found):
                made[_DOUBLED] = {key for key, count in Counter(key for key, _ in found).items() if count > 1}
            return made

        value: Any = loads(decoded, object_pairs_hook=pairs)
        path = [self._name] if self._name in value else self._keys
        for key in path:
            if not isinstance(value, dict):
                return
            if key in value.get(_DOUBLED, ()):
                raise _bad("no_text", f'has the field "{self._name}" twice: mend the line')
            value = value.get(key)


def _object_of(line: str) -> dict[str, Any]:
    """The JSON object that a line spells, numbers of any length included."""
    try:
        try:
            document = json.loads(line)
        except ValueError:  # 4,300 digits are too many for int(), and a file in the middle of others may begin with a BOM
            document = loads(line.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise _bad("not_json", f"is no JSON object ({error.msg} at character {error.pos + 1}): mend the line") from None
    except RecursionError:
        raise _bad("not_json", "is no JSON object that can be read, as it is nested too deeply: mend the line") from None
    if not isinstance(document, dict):
        raise _bad("not_json", f"is no JSON object, but a {type(document).__name__}: mend the line")
    return document


def loads(line: str, **options: Any) -> Any:
    """What a text of JSON spells, with 0 for every whole number: only strings are of use here, and int() refuses 5,000 digits."""
    return json.loads(line, parse_int=lambda digits: 0, **options)


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
