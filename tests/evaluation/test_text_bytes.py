"""Byte counts of an evaluation against the UTF-8 bytes of the held-out text."""

import copy
import json
import math

import pytest
import tokenizer_kinds
from typer.testing import CliRunner

from bitlm_dist.cli import app
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.data_prep.prepare import prepare
from bitlm_dist.errors import UserError
from bitlm_dist.evaluation.text_bytes import check_byte_count

pytestmark = pytest.mark.integration


def bitlm(*words):
    result = CliRunner(env={"COLUMNS": "120"}).invoke(
        app, [str(word) for word in words], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


TEXTS = ["the cat in the hat " * (1 + i % 9) + f"{i} é 日本.\n" for i in range(24)]


def prepared_with(kind, root):
    source = root / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    file = tokenizer_kinds.save(getattr(tokenizer_kinds, kind)(), root / "t" / kind)
    prepare([source], str(file), root / kind, validation_fraction=0.3)
    return root / kind


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return prepared_with("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    return prepared_with("bert", tmp_path_factory.mktemp("bert"))


EVERY = ("--evaluation.every_steps", "1", "--training.steps", "1")
EVALUATED = (*EVERY, "--evaluation.num_sampled_blocks", "0", "--evaluation.num_noise_levels", "2")


@pytest.fixture(scope="module")
def run_of(tiny_file, tmp_path_factory):
    """Train once per data folder, with sequences so short that they cut documents."""
    made = {}

    def make(data):
        if data not in made:
            made[data] = tmp_path_factory.mktemp("runs") / data.name
            words = (
                "--data.path",
                data,
                "--run.dir",
                made[data],
                "--data.sequence_length",
                "16",
                "--training.global_batch_tokens",
                "32",
            )
            made[data, "printed"] = bitlm(
                "train", tiny_file, *words, "--training.global_batch_tokens", "32", *EVALUATED
            )

        return made[data], made[data, "printed"]

    return make


def test_bytes_are_those_of_the_text_though_documents_are_cut(llama, run_of):
    run, printed = run_of(llama)
    report = json.loads(bitlm("eval", run, "--split", "train", "--json"))
    manifest = read_manifest(llama)

    assert (
        report["bytes"]
        == manifest["splits"]["train"]["bytes"]
        == manifest["splits"]["train"]["token_bytes"]
        > 0
    )
    assert sum(sizes["bytes"] for sizes in manifest["splits"].values()) == len(
        "".join(TEXTS).encode()
    )
    assert report["bytes_note"] is None
    assert report["bits_per_byte"] == pytest.approx(
        report["nats_per_token"] * report["tokens"] / math.log(2) / report["bytes"]
    )
    assert "approximate" not in printed + bitlm("eval", run)


def test_bits_per_byte_of_a_lossy_tokenizer_are_marked_wherever_they_stand(lossy, llama, run_of):
    (run, printed) = run_of(lossy)
    (plain, _) = run_of(llama)

    assert (
        "warning: bits per byte are approximate: the tokenizer does not give every text back"
        in printed
    )

    shown = bitlm("eval", run)
    assert "approximate bits per byte, upper bound" in shown
    assert "approximate bits per byte, unigrams" in shown
    assert "warning: bits per byte are approximate" in shown

    # by training and by `bitlm eval`
    for line in (run / "evaluations.jsonl").read_text().splitlines():
        assert "of the bytes" in json.loads(line)["validation"]["bytes_note"]

    table = bitlm("compare", plain, run)
    assert table.count("* bert: bits per byte are approximate") == 1
    assert "* llama" not in table

    marked = [
        row for row in bitlm("compare", "--markdown", plain, run).splitlines() if " * |" in row
    ]

    assert [row.split(" | ")[0] for row in marked] == ["| bert"]


def test_a_count_that_is_not_the_manifest_s_is_an_error_of_eval_and_a_note_of_training(
    llama, run_of, tiny_file, tmp_path
):
    run, _ = run_of(llama)
    file = llama / "manifest.json"
    whole = file.read_text()

    try:
        manifest = json.loads(whole)
        manifest["splits"]["validation"]["token_bytes"] += 1
        file.write_text(json.dumps(manifest))

        with pytest.raises(
            UserError,
            match=f"manifest.json has .*: hash the folder with `bitlm data verify {llama}`",
        ):
            bitlm("eval", run)

        assert (
            json.loads(bitlm("eval", run, "--evaluation.num_sequences", "2", "--json"))[
                "bytes_note"
            ]
            is None
        )
        assert "hash the folder with" in bitlm(
            "train", tiny_file, "--data.path", llama, "--run.dir", tmp_path / "r", *EVALUATED
        )
    finally:
        file.write_text(whole)


def test_an_older_manifest_is_believed_as_far_as_the_count_goes(llama, lossy, tmp_path):
    """It lacks the count of token bytes; the note says how to add it."""
    older = {}
    for folder in (llama, lossy):
        older[folder] = copy.deepcopy(read_manifest(folder))
        del older[folder]["round_trip"], older[folder]["splits"]["validation"]["token_bytes"]
    text = older[llama]["splits"]["validation"]["bytes"]

    assert check_byte_count(llama, older[llama], "validation", text, True) == (None, False)

    for folder, counted, is_whole in (
        (llama, text, False),
        (llama, text - 1, True),
        (lossy, 100, True),
    ):
        note, contradicts = check_byte_count(folder, older[folder], "validation", counted, is_whole)
        assert f"`bitlm data verify {folder} --write`" in note
        assert not contradicts

    small = prepared_with("lower_case", tmp_path)
    manifest = read_manifest(small)
    del manifest["splits"]["validation"]["token_bytes"]
    bytes_ = manifest["splits"]["validation"]["bytes"]

    assert (
        check_byte_count(small, manifest, "validation", bytes_, True).note
        == "the tokenizer does not keep upper case"
    )
