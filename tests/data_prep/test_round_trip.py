"""Encoding settings of a tokenizer.json are ignored, and text lost by a tokenizer is reported."""

import hashlib
import json
import shutil

import pytest
import tokenizer_kinds
from typer.testing import CliRunner

from bitlm_dist.cli import app
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.data.shards import DocumentShards
from bitlm_dist.data_prep import output_units, round_trip
from bitlm_dist.data_prep.prepare import prepare
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.formatting import format_percent

TEXTS = [f"the cat in THE hat {i}  two blanks.\nthe cat, the cat in the cat" for i in range(40)]
ASKS = {
    "truncation": lambda model: model.enable_truncation(4),
    "padding": lambda model: model.enable_padding(pad_id=2, pad_token="</s>"),
    "BPE dropout 0.3": lambda model: setattr(model.model, "dropout", 0.3),
}


@pytest.fixture
def small(tmp_path):
    """A corpus of 40 short documents."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def tokens_in(folder, split="train"):
    with DocumentShards(folder, split) as shards:
        return [shards.tokens(i).tolist() for i in range(len(shards.document_lengths))]


@pytest.mark.parametrize("ask", ASKS)
def test_what_a_tokenizer_file_asks_for_at_encoding_is_not_done(ask, tmp_path):
    """Neither is the post-processor, which puts BOS and EOS around a text."""
    plain = tokenizer_kinds.llama()
    asking = tokenizer_kinds.llama()
    ASKS[ask](asking)
    expected, found = (
        Tokenizer(tokenizer_kinds.save(model, tmp_path / name))
        for name, model in (("a", plain), ("b", asking))
    )
    assert [len(ask) > 0 for ask in found.not_applied] == [True]
    assert found.not_applied[0].startswith(ask)
    assert expected.not_applied == []
    for got, ids in zip(found.encode_batch(TEXTS), expected.encode_batch(TEXTS), strict=True):
        assert got.tolist() == ids.tolist()


@pytest.mark.integration
def test_a_preparation_says_what_it_does_not_apply_and_counts_the_bytes_of_tokens(small, tmp_path):
    model = tokenizer_kinds.llama()
    for ask in ASKS.values():
        ask(model)
    file = tokenizer_kinds.save(model, tmp_path / "t")
    words = [
        "prep",
        str(small),
        "--tokenizer",
        str(file),
        "--out",
        str(tmp_path / "out"),
        "--validation",
        "0.2",
        "--workers",
        "1",
    ]

    output = CliRunner().invoke(app, words, catch_exceptions=False).output
    asked = "truncation to 4 tokens, padding, BPE dropout 0.3"
    line = f"warning: tokenizer.json asks for {asked}: not applied, documents are encoded whole"
    assert [row for row in output.splitlines() if row.startswith("warning")] == [line]
    manifest = read_manifest(tmp_path / "out")
    assert manifest["round_trip"]["lossless"]
    assert (
        manifest["round_trip"]["documents"],
        manifest["round_trip"]["decoded"] >= round_trip.MIN_DECODED,
    ) == (len(TEXTS), True)

    sizes = manifest["splits"].values()
    assert (
        sum(split["token_bytes"] for split in sizes)
        == sum(split["bytes"] for split in sizes)
        == len("".join(TEXTS).encode())
    )
    assert all(split["token_bytes"] == split["bytes"] > 0 for split in sizes)
    assert line.removeprefix("warning: ") in (tmp_path / "out/report.md").read_text()
    decoder = Tokenizer.from_folder(tmp_path / "out/tokenizer")
    assert sorted(
        map(decoder.decode, tokens_in(tmp_path / "out") + tokens_in(tmp_path / "out", "validation"))
    ) == sorted(TEXTS)


# Characters lost per document: three in upper case, and with BERT a line feed.
LOST = {"bert": 4, "lower_case": 3}


@pytest.mark.integration
@pytest.mark.parametrize("kind", LOST)
def test_a_tokenizer_that_does_not_give_the_text_back_is_said_with_what_is_lost(
    kind, small, tmp_path
):
    file = tokenizer_kinds.save(getattr(tokenizer_kinds, kind)(), tmp_path / "t")
    report = prepare([small], str(file), tmp_path / "out", validation_fraction=0.0)
    (line,) = report.warnings
    found = read_manifest(tmp_path / "out")["round_trip"]
    assert not found["lossless"]
    assert found["changed"] == found["decoded"] >= round_trip.MIN_DECODED, (
        "every document has blanks and upper case"
    )
    assert found["other_bytes"] == (len(TEXTS) if kind == "bert" else 0)
    assert found["lost"] == LOST[kind] * found["decoded"]
    percent = format_percent(found["lost"] / found["characters"])
    assert f"lost {percent} of their characters" in line
    assert "the cat in THE hat" in found["first"]["text"]
    assert f"{found['first']['text']!r} became {found['first']['decoded']!r}" in line


def test_one_document_in_a_hundred_is_decoded_and_twenty_at_least(monkeypatch, tmp_path):
    """Documents are chosen by their hashes; the first mismatch is shown even if not among them."""
    tokenizer = Tokenizer(tokenizer_kinds.save(tokenizer_kinds.llama(), tmp_path))
    texts = [f"the cat {i}".encode() for i in range(3000)]
    hashes = [hashlib.sha256(text).digest() for text in texts]
    encoded = tokenizer.encode_batch([text.decode() for text in texts])
    sizes = tokenizer.byte_lengths.of_documents(encoded)
    late = round_trip.check_round_trip(
        texts, hashes, encoded, sizes, tokenizer, round_trip.MIN_DECODED
    )
    assert 10 < late["decoded"] < 60
    again = round_trip.check_round_trip(
        texts[::-1], hashes[::-1], encoded[::-1], sizes[::-1], tokenizer, round_trip.MIN_DECODED
    )
    assert again == late, "the order is no matter"
    early = round_trip.check_round_trip(
        texts[:15], hashes[:15], encoded[:15], sizes[:15], tokenizer, 0
    )
    assert early["decoded"] == 15
    none = round_trip.check_round_trip([], [], [], sizes[:0], tokenizer, 0)
    assert round_trip.sum_results([late, early, none])["lossless"]

    not_decoded = next(
        i
        for i in range(3000)
        if i not in round_trip._choose_documents_to_decode(hashes, round_trip.MIN_DECODED)
    )
    encoded[not_decoded] = encoded[not_decoded][:-1]
    sizes = tokenizer.byte_lengths.of_documents(encoded)
    found = round_trip.check_round_trip(
        texts, hashes, encoded, sizes, tokenizer, round_trip.MIN_DECODED
    )
    assert (found["other_bytes"], found["changed"], found["decoded"]) == (1, 0, late["decoded"])
    assert found["first"] == {
        "text": texts[not_decoded].decode(),
        "decoded": texts[not_decoded].decode()[:-1],
    }
    assert not round_trip.sum_results([late, found])["lossless"]


@pytest.mark.integration
def test_units_of_a_version_that_did_not_check_are_written_again(small, tmp_path, monkeypatch):
    monkeypatch.setattr(output_units, "MEGABYTE", 1000)
    file = tokenizer_kinds.save(tokenizer_kinds.gpt2(), tmp_path / "t")
    first = prepare([small], str(file), tmp_path / "out")
    record = next((tmp_path / "out/units").iterdir())
    document = json.loads(record.read_text())
    del document["round_trip"]
    record.write_text(json.dumps(document))
    again = prepare([small], str(file), tmp_path / "out")
    assert (first.units_reused, again.units_reused) == (0, first.units - 1)


@pytest.mark.integration
def test_an_older_folder_gets_its_bytes_from_verify(small, tmp_path):
    """Only the tokens are left: their bytes are counted, and the tokenizer is tested for case."""
    for name, lossless in (("llama", True), ("bert", False), ("lower_case", False)):
        out = tmp_path / name
        prepare(
            [small],
            str(tokenizer_kinds.save(getattr(tokenizer_kinds, name)(), tmp_path / "t" / name)),
            out,
            0.2,
        )

        manifest = read_manifest(out)
        expected = {split: sizes.pop("token_bytes") for split, sizes in manifest["splits"].items()}
        del manifest["round_trip"]
        (out / "manifest.json").write_text(json.dumps(manifest))

        shown = CliRunner().invoke(
            app, ["data", "verify", str(out), "--write"], catch_exceptions=False
        )
        assert shown.exit_code == 0
        assert ("do not give the text back" in shown.output) == (not lossless)

        found = read_manifest(out)
        assert {split: sizes["token_bytes"] for split, sizes in found["splits"].items()} == expected
        assert found["round_trip"]["lossless"] == lossless
        assert all(f"{size:,} bytes" in shown.output for size in expected.values())


def test_damage_is_not_written_into_a_manifest(prepared, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(prepared, out)
    before = (out / "manifest.json").read_bytes()
    shard = next((out / "train").rglob("*.zstd"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert CliRunner().invoke(app, ["data", "verify", str(out), "--write"]).exit_code == 1
    assert (out / "manifest.json").read_bytes() == before
