import json
import shutil

import pytest
from typer.testing import CliRunner

from bitlm_dist.cli import app
from bitlm_dist.errors import UserError
from bitlm_dist.evaluation.run_records import load_record
from bitlm_dist.training.evaluation_records import read_evaluations

pytestmark = pytest.mark.integration


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def trained(tiny, prepared, tmp_path):
    def make(name, *overrides):
        words = (
            "--evaluation.every_steps",
            "2",
            "--evaluation.num_sampled_blocks",
            "8",
            "--evaluation.num_noise_levels",
            "2",
        )
        run(
            "train",
            tiny.file,
            "--data.path",
            prepared,
            "--run.dir",
            tmp_path / name,
            *words,
            *overrides,
        )
        return tmp_path / name

    return make


def test_training_evaluates_and_runs_are_compared(trained, tmp_path):
    first = trained("softmax", "--model.output", "softmax", "--training.steps", "5")
    second = trained("bits", "--training.steps", "4")
    lines = [json.loads(line) for line in (first / "evaluations.jsonl").read_text().splitlines()]

    assert [line["step"] for line in lines] == [2, 4, 5], "every two steps and at the end"
    assert [line["tokens"] for line in lines] == [512, 1024, 1280]
    assert lines[0]["cpu_seconds"] < lines[1]["cpu_seconds"] < lines[2]["cpu_seconds"]

    # The whole split is the same text, however many tokens a block has.
    texts = [read_evaluations(folder)[-1]["scored"] for folder in (first, second)]
    assert texts[0] == texts[1]
    assert texts[0]["tokens"] == lines[0]["validation"]["tokens"]
    assert [(line["by"], line["split"]) for line in lines] == [("train", "validation")] * 3

    output = run("compare", first, second, "--plot", tmp_path / "c.svg", "--axis", "cpu_seconds")
    assert "1.000" in output
    assert (tmp_path / "c.svg").is_file()

    table = run("compare", first, second, "--markdown").splitlines()
    assert len(table) == 4

    expected = load_record(second).bits_per_byte / load_record(first).bits_per_byte
    assert f"| {expected:.3f} |" in table[3]


def test_evaluation_does_not_change_training_and_goes_on_after_a_resume(
    trained, tiny, prepared, tmp_path
):
    """Losses are equal with and without; evaluations after the checkpoint are redone."""
    watched = trained("watched", "--checkpoint.every_steps", "2")
    run("train", tiny.file, "--data.path", prepared, "--run.dir", tmp_path / "plain")
    losses = [
        [json.loads(line)["loss"] for line in (f / "metrics.jsonl").open()]
        for f in (watched, tmp_path / "plain")
    ]

    assert losses[0] == losses[1]

    # a kill that left evaluations of steps after the latest checkpoint
    whole = (watched / "evaluations.jsonl").read_text().splitlines()
    shutil.rmtree(watched / "checkpoints/step-00000006")
    again = (
        (trained("watched", "--checkpoint.every_steps", "2") / "evaluations.jsonl")
        .read_text()
        .splitlines()
    )

    assert again[:2] == whole[:2]
    assert json.loads(again[2])["validation"] == json.loads(whole[2])["validation"]


def test_bad_comparisons_are_one_line(tmp_path, tiny, prepared):
    run(
        "train",
        tiny.file,
        "--data.path",
        prepared,
        "--run.dir",
        tmp_path / "run",
        "--training.steps",
        "1",
    )

    for words, message in (
        ((tmp_path / "none",), "is no run folder"),
        ((tmp_path / "run",), "holds no evaluations: train it with --evaluation.every_steps N"),
        (
            (tmp_path / "run", "--axis", "miles"),
            "--axis miles: choose from predicted_tokens, text_bytes, tokens, cpu_seconds",
        ),
        ((tmp_path / "run", "--plot", "x.doc"), "--plot x.doc: name a file that ends in"),
    ):
        with pytest.raises(UserError, match=message):
            run("compare", *words)
