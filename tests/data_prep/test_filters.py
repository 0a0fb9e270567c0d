import json
import random
import re
import unicodedata

import numpy as np
import pytest

from bitlm_dist.data_prep.filters import (
    NGRAM_SIZE,
    DecontaminationFilter,
    LanguageFilter,
    ngram_hashes,
)
from bitlm_dist.errors import UserError

ENGLISH = (
    "This is a sentence that anybody would take for English, "
    "and here is another one to be sure about that."
)
FRENCH = (
    "Ceci est une phrase que tout le monde prendrait pour du français, "
    "et en voici une autre pour en être sûr."
)


def grams(text):
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + NGRAM_SIZE]) for i in range(len(words) - NGRAM_SIZE + 1)]


def test_hit_ratio_is_that_of_brute_force(tmp_path, seed):
    rng = random.Random(seed)
    words = ["Alpha", "beta", "gamma", "delta", "Épsilon"]
    held = [" ".join(rng.choices(words, k=rng.randrange(5, 60))) for _ in range(30)]
    (tmp_path / "a.txt").write_text(held[0])
    rest = [
        json.dumps({"question": a, "more": {"choices": [b, 3]}})
        for a, b in zip(held[1::2], held[2::2], strict=False)
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(rest))

    index = DecontaminationFilter([tmp_path / "a.txt", tmp_path / "b.jsonl"], 0.1)
    known = {gram for text in held[: 1 + 2 * len(rest)] for gram in grams(text)}

    partly = 0
    for _ in range(200):
        pieces = [
            rng.choice(held)
            if rng.random() < 0.5
            else " ".join(rng.choices([*words, "other"], k=20))
            for _ in range(3)
        ]
        text = ", ".join(pieces).upper()
        hits = [gram in known for gram in grams(text)]
        expected = sum(hits) / len(hits) if hits else 0.0
        assert index.hit_ratio(text) == pytest.approx(expected)
        assert index.is_contaminated(text) == (expected >= 0.1)
        partly += 0 < expected < 1

    assert partly > 20
    assert index.hit_ratio("too short") == 0


def test_evaluation_files_that_cannot_serve_are_named(tmp_path):
    with pytest.raises(UserError, match="--decontaminate .*none.txt cannot be read"):
        DecontaminationFilter([tmp_path / "none.txt"], 0.1)
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(UserError, match="no text there has 13 words"):
        DecontaminationFilter([tmp_path / "short.txt"], 0.1)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(
        UserError, match="--decontaminate .*bad.jsonl:1 is no JSON that can be read"
    ):
        DecontaminationFilter([tmp_path / "bad.jsonl"], 0.1)


ESCAPED = (
    "wörter und sätze die in json anders buchstabiert sind als im text, \u2028 "
    "hier noch mehr davon, ähnlich überall"
)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "X.JSONL", "x.ndjson", "x.txt"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_evaluation_text_is_found_however_it_is_spelled(tmp_path, name, ascii_only):
    file = tmp_path / name
    spelled = unicodedata.normalize("NFD", ESCAPED)
    text = (
        spelled
        if name.endswith("txt")
        else json.dumps({"n": 10**40, "q": spelled}, ensure_ascii=ascii_only) + "\n"
    )
    file.write_text("\ufeff" + text.replace("1" + "0" * 40, "9" * 5000), encoding="utf-8")
    assert DecontaminationFilter([file], 0.1).hit_ratio(ESCAPED) == 1


def test_polynomial_tells_neighbourhoods_apart():
    values = np.arange(50, dtype=np.uint64)
    hashes = ngram_hashes(np.concatenate([values, values[:20]]), 5)
    assert len(hashes) == 66
    assert np.array_equal(hashes[50:], hashes[:16])
    assert len(np.unique(hashes)) == 50
    assert len(ngram_hashes(values[:3], 5)) == 0


def test_language():
    pytest.importorskip("py3langid")
    english = LanguageFilter("en", 0.5)
    assert english.is_in_language(ENGLISH)
    assert not english.is_in_language(FRENCH)
    assert LanguageFilter("fr", 0.5).is_in_language(FRENCH)
    assert not LanguageFilter("en", 1.0).is_in_language("ok")
    with pytest.raises(UserError, match="--language xx is not known: choose from .* en "):
        LanguageFilter("xx", 0.5)


def test_a_missing_detector_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "py3langid.langid", None)
    with pytest.raises(UserError, match=r"pip install 'bitlm-dist\[language\]'"):
        LanguageFilter("en", 0.5)
