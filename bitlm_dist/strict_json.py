"""JSON that every reader accepts: without NaN and Infinity."""

import json
from math import isfinite
from typing import Any


def to_json(value: Any, **json_options: Any) -> str:
    """Serialize to strict JSON, which has no NaN and no Infinity.

    A non-finite number becomes null, and its name is listed under the additional key
    ``not_finite`` of the object, e.g. ``["loss", "sides.bits.mfu"]``. In a list, every object has
    a key of its own.

    Args:
        value: dicts, lists, strings, numbers, booleans and None.
        json_options: options of ``json.dumps``: ``indent``, ``separators``, ``sort_keys``.
    """
    # Non-finite numbers are rare, so the value is only walked through if json refuses it.
    try:
        return json.dumps(value, allow_nan=False, **json_options)
    except ValueError:
        flagged = (
            [_with_not_finite_names(entry) for entry in value]
            if isinstance(value, list)
            else _with_not_finite_names(value)
        )
        return json.dumps(flagged, allow_nan=False, **json_options)


def _with_not_finite_names(value: Any) -> Any:
    names: list[str] = []
    finite = _replace_not_finite(value, "", names)
    return {**finite, "not_finite": names} if names and isinstance(finite, dict) else finite


def _replace_not_finite(value: Any, name: str, names: list[str]) -> Any:
    """Copy ``value`` with None for non-finite numbers, and append their names to ``names``."""
    if isinstance(value, dict):
        return {
            key: _replace_not_finite(inner, f"{name}.{key}" if name else str(key), names)
            for key, inner in value.items()
        }

    if isinstance(value, list | tuple):
        return [
            _replace_not_finite(inner, f"{name}.{i}" if name else str(i), names)
            for i, inner in enumerate(value)
        ]

    # bool and int are always finite
    if isinstance(value, float) and not isfinite(value):
        names.append(name)
        return None
    return value
