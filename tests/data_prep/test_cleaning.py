import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlm_dist.data_prep.cleaning import clean

TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("\r\n\t\x00\x85\x9fe\u0301a\u030a"),
    ),
    max_size=60,
)


def slowly(text):
    """Clean a text character by character, by the rule of the docstring."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    return unicodedata.normalize("NFC", text)


@given(TEXT)
def test_cleaning_follows_its_rule_and_is_done_once(text):
    counts = Counter()
    cleaned, raw = clean(text, counts)
    assert cleaned == slowly(text)
    assert raw == cleaned.encode()
    assert counts["line_ends"] == text.count("\r")
    assert counts["control_characters"] == sum(
        unicodedata.category(c) == "Cc" for c in text if c not in "\n\t\r"
    )
    assert (sum(counts.values()) > 0) == (cleaned != text)

    again = Counter()
    assert clean(cleaned, again) == (cleaned, raw)
    assert not again.total()


def test_half_a_character_is_refused():
    with pytest.raises(UnicodeEncodeError):
        clean("\ud83d", Counter())
