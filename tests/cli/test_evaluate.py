import json
import re
import shutil

import pytest

from bitlm_dist.cli import evaluate, trained_run
from bitlm_dist.errors import UserError
from bitlm_dist.training import weights
from bitlm_dist.training.run_folder import RunFolder

QUICK = (
    "--evaluation.num_sequences",
    4,
    "--evaluation.num_noise_levels",
    2,
    "--evaluation.num_sampled_blocks",
    8,
)


def records(run):
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("command", ["eval", "generate"])
@pytest.mark.parametrize(
    "change", ["--model.backbone.num_layers=1", "--model.backbone.rope_theta=9"]
)
def test_no_score_or_text_of_another_model_is_printed_under_a_run_s_name(
    command, change, trained_run, bitlm
):
    with pytest.raises(UserError, match=f"{change.partition('=')[0]} describes the trained model"):
        bitlm(command, trained_run, change)


def test_a_smaller_model_is_refused_by_the_checkpoint_even_if_no_key_was_given(
    trained, bitlm, monkeypatch
):
    monkeypatch.setattr(trained_run, "is_changeable", lambda key: True)
    monkeypatch.setattr(weights, "check_same_model", lambda *arguments: None)
    expected = "step-00000003: holds model.* which the model does not have: .* of another model"
    with pytest.raises(UserError, match=expected):
        bitlm("eval", trained, "--model.backbone.num_layers", 1)


@pytest.mark.parametrize(("key", "old", "new"), [("rope_theta", 1000000, 10), ("num_layers", 2, 1)])
def test_a_config_that_was_edited_afterwards_is_no_other_model(key, old, new, trained, bitlm):
    file = trained / "config.yaml"
    text = file.read_text()
    assert f"    {key}: {old}\n" in text
    file.write_text(text.replace(f"    {key}: {old}\n", f"    {key}: {new}\n"))

    expected = f"{key} = {new}, but step-00000003 was trained with {old}: restore that value"
    with pytest.raises(UserError, match=f"{file}: model.backbone.{expected}"):
        bitlm("generate", trained)


def test_the_result_is_recorded_with_what_was_scored(trained, bitlm):
    report = json.loads(bitlm("eval", trained, "--json", *QUICK).stdout)
    bitlm("eval", trained, *QUICK, "--split", "train")
    part, train = records(trained)

    assert part["scored"] == report["scored"]
    assert report["scored"]["tokens"] == report["tokens"] == part["validation"]["tokens"]
    assert (part["step"], part["by"], part["split"]) == (3, "eval", "validation")
    assert part["predicted_tokens"] > 0
    assert part["settings"]["evaluation.num_sequences"] == 4
    assert part["settings"]["sampling.sampler"] == "sequential"
    assert train["split"] == "train"
    assert train["scored"]["data"] != part["scored"]["data"]

    # A resumed run must still make the evaluation of this step itself.
    assert RunFolder(trained).last_evaluation(3) == 0


def test_the_result_is_recorded_although_training_has_deleted_the_checkpoint(
    trained, bitlm, monkeypatch
):
    score = evaluate._score

    def score_and_delete(*arguments):
        report = score(*arguments)
        shutil.rmtree(trained / "checkpoints" / "step-00000003")
        return report

    monkeypatch.setattr(evaluate, "_score", score_and_delete)
    assert "bits per byte" in bitlm("eval", trained, *QUICK).stdout
    assert [record["step"] for record in records(trained)] == [3]


def test_a_run_folder_that_cannot_be_written_is_evaluated_all_the_same(trained, bitlm):
    (trained / "evaluations.jsonl").mkdir()
    result = bitlm("eval", trained, *QUICK)
    assert "is above the unigram entropy" in result.stdout
    warning = "bitlm: warning: the evaluation is not recorded: .*evaluations.jsonl: is a directory"
    assert re.search(warning, result.stderr)


def test_the_table_fits_80_columns_and_no_pair_of_it_is_broken(trained_run, bitlm, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "r")
    lines = bitlm("eval", run, "--evaluation.num_sequences", 4, columns=80).stdout.splitlines()
    table = [line for line in lines if line.startswith("│")]
    assert {len(line) for line in table} <= set(range(81))
    assert sum(len(re.findall(r"0\.\d\d: [ \d]{3}\.\d%", line)) for line in table) == 8
    for label in ("bits per byte, upper bound", "bits per byte, chain rule", "invalid codes"):
        assert sum(line.startswith(f"│ {label}") for line in table) == 1


def test_what_a_model_is_loaded_from_is_named_if_it_is_gone(trained, bitlm):
    codes = (trained / "codes.npz").read_bytes()
    for content in (b"", codes[:40], b"no archive"):
        (trained / "codes.npz").write_bytes(content)
        with pytest.raises(UserError, match=f"{trained}/codes.npz is damaged: copy it from"):
            bitlm("generate", trained)

    (trained / "codes.npz").unlink()
    with pytest.raises(UserError, match="codes.npz is missing: copy it from"):
        bitlm("eval", trained)
    shutil.rmtree(trained / "tokenizer")
    with pytest.raises(UserError, match="tokenizer is missing: copy the folder tokenizer of"):
        bitlm("generate", trained)
