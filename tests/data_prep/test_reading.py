import json

import pytest
from bitlm_dist.data_prep.reading import Reader
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.data_prep.sources import Chunk

from bitlm_dist.errors import UserError


def batch_of(*lines, **settings):
    return Reader(Settings(**settings)).read(Chunk(0, b"\n".join(lines), None, ("x.jsonl",), 1, 0, 0))


def line(text, **more):
    return json.dumps({"text": text, **more}).encode()


BAD = [
    (b"{broken", "not_json", "is no JSON object"),
    (b'{"text": "a"} {"text": "b"}', "not_json", "is no JSON object"),
    (b"[1]", "not_json", "is no JSON object"),
    (b"[" * 100_000, "not_json", "is no JSON object"),
    (b'{"text": ' + b"9" * 5000 + b"}", "not_json", "is no JSON object"),
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
    assert {name: count for name, count in skipped.counts.items() if count} == {"read": 3, reason: 1}


def test_every_document_is_counted_once():
    texts = ["fine text", " \n\t ", "\x00\x01", "", "no", "much too long " * 9, "cafe\u0301 \r\nline"]
    batch = batch_of(*map(line, texts), min_chars=3, max_chars=20)
    assert [text.decode() for text in batch.texts] == ["fine text", "café \nline"]
    counts = {name: count for name, count in batch.counts.items() if count}
    changes = {"line_ends": 1, "control_characters": 2, "normalized": 1}
    assert counts == {"read": 7, "empty": 3, "too_short": 1, "too_long": 1, **changes}


def test_no_length_is_too_long_for_zero():
    assert len(batch_of(line("x" * 100_000), max_chars=0).texts) == 1


def test_another_field():
    assert batch_of(b'{"body": "x", "text": 1}', field="body").texts == [b"x"]


GOOD = "In the beginning God created the heaven and the earth, and the earth was without form, and void; and darkness was upon"


def test_filters_are_applied_and_counted(tmp_path):
    held = tmp_path / "eval.txt"
    held.write_text(GOOD)
    german = "Am Anfang schuf Gott Himmel und Erde, und die Erde war wüst und leer, und es war finster auf der Tiefe."
    other = "The quick brown fox jumps over the lazy dog while everybody in the house is looking at something else entirely."
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
