from collections import Counter

import pytest

from bitlm_dist.data_prep.reading import DROP_REASONS
from bitlm_dist.data_prep.report import DESCRIPTIONS, PLURALS, REMEDIES, drop_remedy, drop_summary


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, "none"),
        ({"duplicate": 1, "empty": 1}, "1 empty, 1 copy of an earlier document"),
        ({"duplicate": 1425, "too_long": 2}, "2 longer than --max-chars, 1,425 copies of earlier"),
        ({"contaminated": 2}, "2 contain evaluation text"),
        ({"contaminated": 1}, "1 contains evaluation text"),
    ],
)
def test_one_document_is_told_from_many(counts, words):
    assert drop_summary(Counter(counts)).startswith(words)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, ""),
        ({"empty": 3}, ""),
        ({"too_long": 3, "empty": 2}, ": raise --max-chars (0: no limit), or cut .txt files"),
        ({"too_short": 1, "no_text": 2}, ": name the key or column of the text with --field"),
    ],
)
def test_the_most_frequent_reason_has_the_remedy(counts, words):
    assert drop_remedy(Counter(counts)).startswith(words)
    assert bool(drop_remedy(Counter(counts))) == bool(words)


def test_every_reason_has_words():
    assert set(DROP_REASONS) <= set(DESCRIPTIONS)
    assert set(PLURALS) | set(REMEDIES) <= set(DROP_REASONS)
