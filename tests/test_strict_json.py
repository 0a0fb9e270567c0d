"""JSON with non-finite numbers, and that everything writes JSON through one function."""

import ast
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlm_dist.strict_json import to_json

ROOT = Path(__file__).parent.parent
NAN = math.nan
INF = math.inf
leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats()
keys = st.text("abc", min_size=1, max_size=2)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(keys, values, max_size=4)


def strict(text):
    """Parse JSON as most languages do, without NaN and Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def leaves_of(value, name=""):
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves_of(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


@given(objects)
def test_every_number_that_is_not_finite_is_null_and_named_and_nothing_else_changes(value):
    found = strict(to_json(value))
    named = found.pop("not_finite", [])
    expected = dict(leaves_of(value))
    assert sorted(named) == sorted(
        name
        for name, leaf in expected.items()
        if isinstance(leaf, float) and not math.isfinite(leaf)
    )
    assert dict(leaves_of(found)) == {
        name: None if name in named else leaf for name, leaf in expected.items()
    }


def test_objects_of_a_list_have_their_own_flags():
    assert strict(to_json([{"a": NAN}, {"a": 1.5}, 3])) == [
        {"a": None, "not_finite": ["a"]},
        {"a": 1.5},
        3,
    ]
    assert strict(to_json({"loss": NAN, "sides": {"bits": (1.0, INF)}})) == {
        "loss": None,
        "sides": {"bits": [1.0, None]},
        "not_finite": ["loss", "sides.bits.1"],
    }


def test_the_layout_is_that_of_json():
    for layout in ({}, {"indent": 1}, {"separators": (",", ":"), "sort_keys": True}):
        assert to_json({"b": 1, "a": [True, None, "ü"]}, **layout) == json.dumps(
            {"b": 1, "a": [True, None, "ü"]}, **layout
        )


def packages():
    for folder in ("bitlm_dist", "kernels", "data_prep", "launch"):
        yield from sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", packages(), ids=lambda file: str(file.relative_to(ROOT)))
def test_json_is_written_by_one_function(file):
    names = [
        node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)
    ]
    writers = [node.lineno for node in names if ast.unparse(node) in ("json.dump", "json.dumps")]
    assert not writers or file == ROOT / "bitlm_dist" / "strict_json.py", (
        f"lines {writers}: use bitlm_dist.strict_json.to_json"
    )
