import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitlm_dist.data_prep import output_units
from bitlm_dist.data_prep.output_units import split_into_units
from bitlm_dist.data_prep.tokenizer import Tokenizer, train_bpe


def pairs(texts):
    return [(text, hashlib.sha256(text).digest()) for text in texts]


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=60), st.integers(1, 100))
def test_cutting_loses_nothing_and_names_follow_content(texts, limit):
    found = list(split_into_units(pairs(texts), limit, "key"))
    assert [text for unit in found for text in unit.texts] == texts
    assert all(sum(map(len, unit.texts)) >= limit for unit in found[:-1])
    assert all(sum(map(len, unit.texts[:-1])) < limit for unit in found)
    assert [unit.name for unit in split_into_units(pairs(texts), limit, "key")] == [
        unit.name for unit in found
    ]
    assert not {unit.name for unit in split_into_units(pairs(texts), limit, "other")} & {
        unit.name for unit in found
    }
    assert [int(unit.name.split("-")[0]) for unit in found] == list(range(len(found)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(["some words"], 260, file)
    return Tokenizer(file)


@pytest.fixture
def unit():
    (made,) = split_into_units(
        pairs([f"document {i}".encode() for i in range(40)]), output_units.MEGABYTE, "key"
    )
    return made


def test_a_unit_is_done_when_all_of_it_is_there(tmp_path, unit, tokenizer):
    assert not output_units.is_done(tmp_path, unit.name)
    seconds = output_units.write_unit(unit, tokenizer, tmp_path, 0.3)
    assert set(seconds) == {"tokenize", "check", "write"}
    assert output_units.is_done(tmp_path, unit.name)

    record = output_units.read_unit_record(tmp_path, unit.name)
    assert record["train"]["documents"] + record["validation"]["documents"] == 40
    assert min(record["train"]["documents"], record["validation"]["documents"]) > 3
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    whole = {path: path.read_bytes() for path in files}

    for path in files:
        path.write_bytes(b"") if path.suffix != ".json" else path.unlink()
        assert not output_units.is_done(tmp_path, unit.name)
        output_units.write_unit(unit, tokenizer, tmp_path, 0.3)
        assert {path: path.read_bytes() for path in files} == whole

    for path in files:
        content = bytearray(whole[path])
        content[len(content) // 2] ^= 1 if path.suffix != ".json" else 0xFF
        path.write_bytes(content)  # of the correct size
        assert not output_units.is_done(tmp_path, unit.name)
        output_units.write_unit(unit, tokenizer, tmp_path, 0.3)
        assert {path: path.read_bytes() for path in files} == whole


def test_documents_without_tokens_are_counted_not_written(tmp_path, unit, tokenizer, monkeypatch):
    plain = tokenizer.encode_batch
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda texts: [np.zeros(0, np.uint32), *plain(texts[1:])]
    )
    output_units.write_unit(unit, tokenizer, tmp_path, 0.0)
    record = output_units.read_unit_record(tmp_path, unit.name)
    assert (
        record["no_tokens"],
        record["train"]["documents"],
        record["validation"]["documents"],
    ) == (1, 39, 0)


def test_other_units_go_and_other_files_stay(tmp_path, unit, tokenizer):
    output_units.write_unit(unit, tokenizer, tmp_path, 0.3)
    kept = {path for path in tmp_path.rglob("*") if path.is_file()}
    (other,) = split_into_units(pairs([b"something else"]), output_units.MEGABYTE, "key")
    output_units.write_unit(other, tokenizer, tmp_path, 0.0)
    for name in ("train/.00007-0123456789abcdef", "validation/00007-0123456789abcdef"):
        (tmp_path / name).mkdir()
    for name in (
        "units/notes.txt",
        "train/index.json",
        "units/.00007-0123456789abcdef.json.partial",
    ):
        (tmp_path / name).write_text("x")
    assert len(output_units.stale_units(tmp_path, [unit.name])) == 5
    output_units.remove_stale_units(tmp_path, [unit.name])
    assert not output_units.stale_units(tmp_path, [unit.name])
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == kept | {tmp_path / "units/notes.txt", tmp_path / "train/index.json"}
    assert len(list((tmp_path / "validation").iterdir())) == 1
