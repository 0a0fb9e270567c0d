import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlm_dist.data_prep.single_document import validation_offset

PARAGRAPHS = "".join(
    f"Sentence {i} is here. It ends.\n" + "\n" * (i % 5 == 0) for i in range(200)
).encode()


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (PARAGRAPHS, b"\n\n"),
        (PARAGRAPHS.replace(b"\n\n", b"\n"), b".\n"),
        (PARAGRAPHS.replace(b"\n", b" "), b". "),
        (PARAGRAPHS.replace(b".", b"").replace(b"\n", b" "), b" "),
        ("今天天气很好。".encode() * 300, "。".encode()),
    ],
)
def test_it_is_cut_at_the_best_place_near_the_share(text, end):
    place = validation_offset(text, 0.05)
    assert text[:place].endswith(end)
    assert 0.925 * len(text) <= place <= 0.975 * len(text)
    nearer = [
        i for i in range(len(text)) if abs(i - 0.95 * len(text)) < abs(place - 0.95 * len(text)) - 1
    ]
    assert not any(text.endswith(end, 0, i) for i in nearer)


@settings(max_examples=50)
@given(st.text("aä中\U0001f600 .\n", max_size=80), st.floats(0.001, 0.999))
def test_both_parts_are_text_or_it_is_not_cut(text, share):
    raw = text.encode()
    place = validation_offset(raw, share)
    assert raw[:place].decode() + raw[place:].decode() == text
    assert place == len(raw) or (place > 0 and not raw[place:].isspace())


def test_what_is_too_short_is_not_cut():
    assert validation_offset(b"fine", 0.05) == 4
    assert validation_offset("中".encode(), 0.5) == 3
