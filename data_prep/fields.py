"""Extraction of a document's text from a line, with the reason if there is none."""

import json
import re
from collections import Counter
from typing import Any

from bitlm_dist.data_prep.tables import LIST_SEPARATOR

_DUPLICATE_KEYS: Any = object()  # a key that no JSON has


class BadLineError(Exception):
    """A line is not a document.

    Args:
        reason: one of :data:`~bitlm_dist.data_prep.reading.BAD_LINE_REASONS`.
        message: description that follows the file and line number.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode_utf8(raw: bytes | None) -> str:
    """Decode UTF-8 bytes.

    Raises:
        BadLineError: ``raw`` is not UTF-8, or None.
    """
    if raw is None:
        raise _bad_line("no_text", "is null, expected text")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _bad_line(
            "not_utf8",
            f"is not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x}): "
            "convert it first, e.g. with iconv",
        ) from None


def _bad_line(reason: str, message: str) -> BadLineError:
    return BadLineError(reason, f"{message}; or pass over such documents with --on-error skip")


class TextField:
    """Extracts the text from a line of JSON.

    The text is a string, or a list of strings, which are joined by line breaks.

    Args:
        name: key of the text in the object, or ``a.b`` for key b of the object under key a. A key
            spelled ``a.b`` takes precedence.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._keys = name.split(".")

        # For a fast check for duplicate keys before the line is parsed a second time.
        self._quoted = f'"{self._keys[-1]}"'
        self._key_pattern = re.compile(re.escape(self._quoted) + r"\s*:")

    def extract_text(self, line: bytes) -> str:
        """Extract the text of a document.

        Raises:
            BadLineError: The line is not a JSON object with such a text.
        """
        decoded = decode_utf8(line)
        document = _parse_object(decoded)

        # Parsing again is slow: only if the line spells the key more than once.
        if decoded.count(self._quoted) > 1 and len(self._key_pattern.findall(decoded)) > 1:
            self._reject_duplicate_keys(decoded)

        text = document[self._name] if self._name in document else self._nested(document)
        if isinstance(text, list) and all(isinstance(part, str) for part in text):
            text = LIST_SEPARATOR.join(text)
        if not isinstance(text, str):
            raise _bad_line(
                "no_text",
                f'has a {type(text).__name__} in its field "{self._name}", '
                "expected a string or a list of strings",
            )

        # JSON may escape one half of a surrogate pair, which no UTF-8 can represent.
        if not text.isascii() and _has_surrogate(text):
            raise _bad_line("not_utf8", "spells half a character (a lone surrogate): mend the line")
        return text

    def _nested(self, document: dict[str, Any]) -> Any:
        """Follow the dotted path of the field."""
        value: Any = document
        for key in self._keys:
            if not isinstance(value, dict) or key not in value:
                raise _bad_line(
                    "no_text",
                    f'is a JSON object without a field "{self._name}": '
                    "name the right one with --field",
                )
            value = value[key]
        return value

    def _reject_duplicate_keys(self, decoded: str) -> None:
        """Raise if an object on the path to the text has the key twice.

        JSON parsers silently keep the last value, which may not be the text that was meant.
        """

        def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
            # Remember the duplicates of each object beside its values.
            parsed = dict(found)
            if len(parsed) < len(found):
                parsed[_DUPLICATE_KEYS] = {
                    key for key, count in Counter(key for key, _ in found).items() if count > 1
                }
            return parsed

        value: Any = loads_ignoring_integers(decoded, object_pairs_hook=pairs)

        # Duplicate keys outside the path are harmless.
        path = [self._name] if self._name in value else self._keys
        for key in path:
            if not isinstance(value, dict):
                return
            if key in value.get(_DUPLICATE_KEYS, ()):
                raise _bad_line("no_text", f'has the field "{self._name}" twice: mend the line')
            value = value.get(key)


def _parse_object(line: str) -> dict[str, Any]:
    """Parse a line as a JSON object, with integers of any length."""
    try:
        try:
            document = json.loads(line)
        except ValueError:
            # int() refuses more than 4,300 digits; a concatenated file may begin with a BOM.
            document = loads_ignoring_integers(line.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        raise _bad_line(
            "not_json",
            f"is no JSON object ({error.msg} at character {error.pos + 1}): mend the line",
        ) from None
    except RecursionError:
        raise _bad_line(
            "not_json",
            "is no JSON object that can be read, as it is nested too deeply: mend the line",
        ) from None

    if not isinstance(document, dict):
        raise _bad_line(
            "not_json", f"is no JSON object, but a {type(document).__name__}: mend the line"
        )
    return document


def loads_ignoring_integers(line: str, **options: Any) -> Any:
    """Parse JSON with 0 in place of every integer.

    Only strings are needed here, and int() refuses numbers of several thousand digits.
    """
    return json.loads(line, parse_int=lambda digits: 0, **options)


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
