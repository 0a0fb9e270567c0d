import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlm_dist.formatting import (
    format_duration,
    format_percent,
    format_value,
    plural,
    ratio_or_none,
)


def test_nouns_agree_with_their_numbers():
    assert plural(0, "document") == "0 documents"
    assert plural(1, "document") == "1 document"
    assert plural(3000, "process", "processes") == "3,000 processes"


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.97, "97 %"),
        (0.996, "99.6 %"),
        (0.99999, "99.9 %"),
        (0.012, "1.2 %"),
        (1e-9, "< 0.001 %"),
    ],
)
def test_fractions(fraction, text):
    assert format_percent(fraction) == text


@given(st.floats(min_value=0, max_value=1))
def test_a_fraction_is_never_in_scientific_notation_and_only_all_is_100(fraction):
    text = format_percent(fraction)
    assert "e" not in text
    assert (text == "100 %") == (fraction == 1.0)
    if fraction > 1e-5:
        shown = float(text.split()[0])
        assert math.isclose(shown, 100 * fraction, rel_tol=0.06, abs_tol=1e-4)


def test_durations_and_missing_values():
    assert format_duration(3723.4) == "1:02:03"
    assert format_duration(90_000) == "1 day, 1:00:00"
    assert format_value(None) == "–"
    assert ratio_or_none(1.0, 0.0) is None
    assert ratio_or_none(None, 2.0) is None
    assert ratio_or_none(1.0, 2.0) == 0.5
