import json

import pytest

from bitlm_dist.data_prep.reading import ChunkReader
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.data_prep.sources import Chunk
from bitlm_dist.errors import UserError


def batch_of(*lines, **settings):
    return ChunkReader(Settings(**settings)).read_chunk(
        Chunk(0, b"\n".join(lines), None, ("x.jsonl",), 1, 0, 0)
    )


def line(text, **more):
    return json.dumps({"text": text, **more}).encode()


BAD = [
    (
        b"{broken",
        "not_json",
        r"is no JSON object \(Expecting property name .* at character 2\): mend the line",
    ),
    (
        b'{"text": "a"} {"text": "b"}',
        "not_json",
        r"is no JSON object \(Extra data at character 15\)",
    ),
    (
        b'{"text": "\x00"}',
        "not_json",
        r"is no JSON object \(Invalid control character at at character 11\)",
    ),
    (b"\x00" * 9, "not_json", r"is no JSON object \(Expecting value at character 1\)"),
    (b"[1]", "not_json", "is no JSON object, but a list"),
    (
        b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "not_json",
        "is no JSON object .*nested too deeply",
    ),
    (b'{"text": ' + b"9" * 5000 + b"}", "no_text", 'has a int in its field "text"'),
    (b'{"text": NaN}', "no_text", "has a float"),
    (b'{"text": ["a", null]}', "no_text", "has a list .*expected a string or a list of strings"),
    (
        b'{"text": "a", "b": {}, "text": "c"}',
        "no_text",
        'has the field "text" twice: mend the line',
    ),
    (b'{"body": "x"}', "no_text", 'without a field "text": name the right one with --field'),
    (b'{"text": 5}', "no_text", 'has a int in its field "text"'),
    (b'{"text": null}', "no_text", "has a NoneType"),
    (b'{"text": "\xff"}', "not_utf8", r"is not UTF-8 \(byte 10 is 0xff\): convert it"),
    (rb'{"text": "half \ud83d"}', "not_utf8", "half a character"),
]


@pytest.mark.parametrize(("bad", "reason", "message"), BAD)
def test_a_bad_line_is_named_with_its_number_or_counted(bad, reason, message):
    lines = (line("one"), b"", bad, line("two"))
    stopped = batch_of(*lines)
    assert stopped.texts == [b"one"]
    with pytest.raises(UserError, match=f"x.jsonl:3 .*{message}"):
        raise UserError(stopped.error)
    assert "\n" not in stopped.error
    skipped = batch_of(*lines, on_error="skip")
    assert (skipped.error, skipped.texts) == (None, [b"one", b"two"])
    assert {name: count for name, count in skipped.counts.items() if count} == {
        "read": 3,
        reason: 1,
    }


def test_every_document_is_counted_once():
    texts = [
        "fine text",
        " \n\t ",
        "\x00\x01",
        "",
        "no",
        "much too long " * 9,
        "cafe\u0301 \r\nline",
    ]
    batch = batch_of(*map(line, texts), min_chars=3, max_chars=20)
    assert [text.decode() for text in batch.texts] == ["fine text", "café \nline"]
    counts = {name: count for name, count in batch.counts.items() if count}
    changes = {"line_ends": 1, "control_characters": 2, "normalized": 1}
    assert counts == {"read": 7, "empty": 3, "too_short": 1, "too_long": 1, **changes}


def test_no_length_is_too_long_for_zero():
    assert len(batch_of(line("x" * 100_000), max_chars=0).texts) == 1


def test_another_field():
    assert batch_of(b'{"body": "x", "text": 1}', field="body").texts == [b"x"]


GOOD_LINES = [
    (b'{"n": ' + b"9" * 5000 + b', "text": "digits"}', "text", "digits"),
    (
        b'{"n": -' + b"9" * 5000 + b'e-3, "m": [1E400, Infinity, NaN], "text": "digits"}',
        "text",
        "digits",
    ),
    (b'\xef\xbb\xbf{"text": "behind a byte order mark"}', "text", "behind a byte order mark"),
    ('{"text": "a\u2028b\u0085c"}'.encode(), "text", "a\u2028bc"),
    (rb'{"text": "nul \u0000 spelled", "half": "\ud83d"}', "text", "nul  spelled"),
    (b'{"text": ["first", "", "second"]}', "text", "first\n\nsecond"),
    (b'{"a": {"b": "nested", "text": 1}, "text": 2}', "a.b", "nested"),
    (b'{"a.b": "spelled", "a": {"b": "nested"}}', "a.b", "spelled"),
    (b'{"text": "a", "meta": {"text": "b", "x": 1, "x": 2}}', "text", "a"),
]


@pytest.mark.parametrize(("raw", "field", "text"), GOOD_LINES)
def test_what_json_allows_is_read(raw, field, text):
    batch = batch_of(raw, field=field)
    assert (batch.error, [text.decode() for text in batch.texts]) == (None, [text])


def test_a_key_twice_is_refused_on_the_way_to_a_nested_text():
    assert 'the field "a.b" twice' in batch_of(b'{"a": {"b": "x", "b": "y"}}', field="a.b").error
    assert 'without a field "a.c"' in batch_of(b'{"a": {"b": "x"}}', field="a.c").error


GOOD = (
    "In the beginning God created the heaven and the earth, and the earth was without form, "
    "and void; and darkness was upon"
)


def test_filters_are_applied_and_counted(tmp_path):
    held = tmp_path / "eval.txt"
    held.write_text(GOOD)
    german = (
        "Am Anfang schuf Gott Himmel und Erde, und die Erde war wüst und leer, "
        "und es war finster auf der Tiefe."
    )
    other = (
        "The quick brown fox jumps over the lazy dog while everybody in the house is looking at "
        "something else entirely."
    )
    pytest.importorskip("py3langid")
    batch = batch_of(line(GOOD), line(german), line(other), decontaminate=(held,), language="en")
    assert batch.texts == [other.encode()]
    assert (batch.counts["contaminated"], batch.counts["other_language"]) == (1, 1)


def test_settings_out_of_range_are_named():
    for settings, message in [
        ({"on_error": "explode"}, "--on-error explode: choose from stop, skip"),
        ({"min_chars": -1}, "expected 0 or more"),
        ({"min_chars": 9, "max_chars": 3}, "--min-chars 9 is above --max-chars 3"),
        ({"near_dedup": 1.5}, "--near-dedup 1.5: expected a similarity"),
        ({"hit_ratio": 0.0}, "--hit-ratio 0.0: expected a share"),
        ({"language_probability": 2.0}, "--language-probability 2.0: expected a share"),
    ]:
        with pytest.raises(UserError, match=message):
            Settings(**settings).check()
