"""From a tokenizer's folder to text, using only the copies made by preparation and export."""

import json
import shutil

import pytest
import tokenizer_kinds
from typer.testing import CliRunner

from bitlm_dist.cli import app

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def bitlm(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def hugging_face(folder):
    tokenizer_kinds.save(tokenizer_kinds.llama(), folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )


def sentencepiece(folder):
    library = pytest.importorskip("sentencepiece")
    folder.mkdir()
    lines = iter(["the cat in the hat and the man"] * 20)
    settings = {"vocab_size": 290, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    library.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "tokenizer"), **settings
    )


@pytest.mark.parametrize("make", [hugging_face, sentencepiece])
def test_evaluation_export_and_generation_need_the_copies_alone(make, corpus, tiny_file, tmp_path):
    make(tmp_path / "t")
    bitlm(
        "prep",
        corpus,
        "--tokenizer",
        tmp_path / "t",
        "--out",
        tmp_path / "data",
        "--validation",
        "0.1",
        "--workers",
        "2",
    )

    shutil.rmtree(tmp_path / "t")
    words = (
        "--data.path",
        tmp_path / "data",
        "--run.dir",
        tmp_path / "run",
        "--training.steps",
        "1",
    )
    bitlm("train", tiny_file, *words)

    expected = json.loads(bitlm("eval", tmp_path / "run", "--json"))
    bitlm("checkpoint", "export", tmp_path / "run", tmp_path / "exported")
    shutil.rmtree(tmp_path / "run")

    bitlm("checkpoint", "import", tmp_path / "exported", tmp_path / "again")
    found = json.loads(bitlm("eval", tmp_path / "again", "--json"))
    assert {**found, "run": None} == {**expected, "run": None}
    assert (
        found["bytes"]
        == json.loads((tmp_path / "data/manifest.json").read_text())["splits"]["validation"][
            "token_bytes"
        ]
    )

    written = json.loads(
        bitlm("generate", tmp_path / "again", "--prompt", "the cat", "--blocks", "2", "--json")
    )
    assert written["token_ids"]
