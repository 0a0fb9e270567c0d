import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bitlm_dist.cli import app
from bitlm_dist.errors import UserError

runner = CliRunner(env={"COLUMNS": "240"})  # tables wide enough for the paths of temporary folders


def run(*words, code=0):
    result = runner.invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_train_eval_and_generate(trained, prepared):
    assert (trained / "checkpoints" / "step-00000003").is_dir()
    words = ("--evaluation.num_noise_levels", "3", "--evaluation.num_sequences=8")
    report = json.loads(run("eval", trained, "--json", *words))
    promised = {"bits_per_byte", "bits_per_byte_se", "nats_per_token", "unigram_bits_per_byte"}
    assert promised | {"context_shuffle_delta_nats", "invalid_code_rate"} <= set(report)
    assert "bound" in run("eval", trained, *words)

    words = ("generate", trained, "--prompt", "the", "--blocks", "5", "--seed", "2", "--json")
    result = json.loads(run(*words))
    promised = {"text", "token_ids", "backbone_passes", "head_passes", "tokens_per_second"}
    assert set(result) == promised
    assert result["backbone_passes"] <= 5
    assert json.loads(run(*words))["token_ids"] == result["token_ids"]

    sampling = ("--sampling.sampler", "ode", "--sampling.steps", "3")
    assert "tokens/s" in run("generate", trained, "--blocks", "2", "--watch", *sampling)
    assert "is trained: step 3 of 3" in run("train", trained / "config.yaml")


def test_checkpoints_are_listed_and_verified(trained):
    (listed,) = json.loads(run("checkpoint", "list", trained, "--json"))
    folder = trained / "checkpoints" / "step-00000003"
    assert listed["step"] == 3
    assert listed["folder"] == str(folder)
    files = [file for file in folder.iterdir() if file.name != "manifest.json"]
    assert listed["bytes"] == sum(file.stat().st_size for file in files)
    assert listed["healthy"] is None
    assert "step-00000003" in run("checkpoint", "list", trained)
    assert "whole" in run("checkpoint", "verify", trained)

    state = folder / "state.json"
    state.write_text(state.read_text().replace("3", "4", 1))
    assert "damaged" in run("checkpoint", "verify", trained, code=1)
    state.unlink()
    assert "step-00000003 is damaged" in run("checkpoint", "list", trained)
    with pytest.raises(UserError, match="is no run folder"):
        run("checkpoint", "list", trained / "tokenizer")


def test_checkpoints_are_compared_exported_and_imported(trained, tiny, prepared, tmp_path):
    step = trained / "checkpoints" / "step-00000003"
    assert "differ" in run("checkpoint", "diff", trained, step)

    words = ("--run.dir", tmp_path / "other", "--data.path", prepared, "--training.steps=3")
    run("train", tiny.file, *words, "--training.seed=1")
    found = json.loads(run("checkpoint", "diff", trained, tmp_path / "other", "--json", code=1))
    assert found["state"]["training.seed"] == [0, 1]
    # AdamW counts steps, Muon has a momentum buffer: each weight has one of them
    counts = found["tensors"]
    assert counts["weights"] == counts["step"] + counts["momentum_buffer"]
    assert "that differ most" in run("checkpoint", "diff", trained, tmp_path / "other", code=1)

    assert "MiB of weights" in run("checkpoint", "export", trained, tmp_path / "out")
    run("checkpoint", "import", tmp_path / "out", tmp_path / "back")
    words = ("--json", "--evaluation.num_noise_levels", "3", "--evaluation.num_sequences=8")
    reports = [json.loads(run("eval", folder, *words)) for folder in (trained, tmp_path / "back")]
    assert reports[0].pop("run") != reports[1].pop("run")
    assert reports[0] == reports[1]
    with pytest.raises(UserError, match="is no run folder"):
        run("checkpoint", "diff", trained, tmp_path / "out")


def test_a_run_is_not_scored_on_ids_of_another_tokenizer(trained, corpus, tmp_path):
    run("prep", corpus, "--tokenizer", "bpe:310", "--out", tmp_path / "other", "--quiet")
    with pytest.raises(UserError, match=f"{tmp_path}/other has another tokenizer than {trained}"):
        run("eval", trained, "--data.path", tmp_path / "other")


def test_prepared_folders_are_verified(prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "data")
    assert "whole" in run("data", "verify", folder)

    shard = next((folder / "train").rglob("*.mds.zstd"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert "damaged" in run("data", "verify", folder, code=1)
    shard.unlink()
    assert "missing" in run("data", "verify", folder, code=1)

    lengths = folder / "validation" / "lengths.npy"
    lengths.write_bytes(lengths.read_bytes() + b"!")
    assert "lengths.npy is damaged" in run("data", "verify", folder, code=1)

    with pytest.raises(UserError, match="cannot be opened"):
        run("data", "mirror", "ftp://x/y", tmp_path / "copy")


def test_print_config_shows_values_and_sources(tiny):
    output = run("train", tiny.file, "--training.steps", "9", "--print-config")
    assert "  steps: 9  # command line\n" in output
    assert "  precision: fp32\n" in output


def test_dry_run_prints_the_parameters_of_the_8b_model():
    output = run("train", "bitlm-8b", "--dry-run")
    for part in ("backbone", "head", "input", "total"):
        assert part in output
    backbone = next(line for line in output.splitlines() if "backbone" in line)
    assert "6,94" in backbone


PATHS = [
    "prep {corpus} --tokenizer bpe:300 --quiet --out",
    "compare",
    "eval",
    "checkpoint export x",
    "data verify",
    "bench show",
]


@pytest.mark.parametrize("words", PATHS)
def test_paths_are_expanded_or_refused(words, corpus, tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    words = words.format(corpus=corpus).split()
    assert "variable $NOT_SET is not set" in runner.invoke(app, [*words, "$NOT_SET/x"]).output

    if words[0] == "prep":
        monkeypatch.setenv("HOME", str(tmp_path))
        run(*words[:-1], "--out=~/data")
        assert (tmp_path / "data" / "manifest.json").is_file()
        for option, value in (
            ("--tokenizer", "$NOT_SET/tokenizer.json"),
            ("--tokenizer", "~nobody-has-this/t.json"),
        ):
            with pytest.raises(UserError, match=f"{option} .*: "):
                run("prep", corpus, option, value, "--out", tmp_path / "out")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_that_are_none_are_refused(number, corpus, tmp_path):
    prep = ("prep", corpus, "--tokenizer", "bpe:300", "--out", tmp_path / "out")
    for option in ("--validation", "--near-dedup", "--hit-ratio", "--language-probability"):
        with pytest.raises(UserError, match=f"{option} {number}: expected"):
            run(*prep, f"{option}={number}")
    if number == "inf":  # the option's own limit has the others
        with pytest.raises(UserError, match=f"--file-gb {number}: expected"):
            run("checkpoint", "export", tmp_path, tmp_path / "out", f"--file-gb={number}")


def test_prep_reports_in_words_and_in_json(corpus, tmp_path):
    prep = ("prep", corpus, "--tokenizer", "bpe:300", "--out", tmp_path / "out")
    words = (*prep, "--workers", "2", "--min-chars", "10")
    assert "200 documents" in run(*words)

    report = json.loads(run(*words, "--json"))
    assert report["documents"] == 200
    assert report["units_reused"] == report["units"]
    assert report["dropped"] == {}
    missing = {"parse", "tokenize", "all"} - set(report["cpu_seconds"])
    assert missing == {"tokenize"}, "nothing was left to do"
    assert run(*words, "--quiet") == ""

    with pytest.raises(UserError, match="--workers 0: expected at least 1"):
        run(*prep, "--workers", "0")


def test_doctor_names_what_is_missing():
    output = run("doctor")
    packages = ("torch", "megatron-core", "Transformer Engine", "flash-attn")
    for name in (*packages, "merge", "Muon", "bitlm-dist[te]"):
        assert name in output


BAD = [
    (["train", "{tiny}", "--model.blok_size", "4"], "did you mean model.block_size"),
    (["train"], "no config file given"),
    (["train", "{tiny}"], "data.path is not set"),
    (["train", "{tiny}", "--data.path", "{tmp}/none"], "does not exist: prepare it with"),
    (["eval", "{tmp}"], "is no run folder"),
    (["generate", "{tmp}/none"], "is no run folder"),
    (
        ["prep", "{tmp}/none.txt", "--tokenizer", "bpe:300", "--out", "{tmp}/out"],
        "none.txt does not exist",
    ),
    (["prep", "{tiny}", "--tokenizer", "bpe:300", "--out", "{tmp}/out"], "is none of .txt, .jsonl"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_user_errors_name_the_remedy(words, message, tiny, tmp_path):
    with pytest.raises(UserError, match=message):
        run(*(word.format(tiny=tiny.file, tmp=tmp_path) for word in words))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "run").exists()


LINES = [
    (
        ["train", "quickstart", "--trainig.steps", "4"],
        "unknown key trainig.steps (command line): did you mean training.steps?",
    ),
    (
        ["generate", "run", "--blocks", "0"],
        "Invalid value for '--blocks': Input should be greater than or equal to 1",
    ),
    (["prep", "x.txt"], "Missing option '--tokenizer'."),
]


@pytest.mark.parametrize(("words", "message"), LINES)
def test_the_command_prints_one_line_and_exits_with_2(words, message, tmp_path):
    """Runs the entry point in a separate process."""
    command = [sys.executable, "-m", "bitlm_dist", *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr == f"bitlm: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_layout_that_does_not_fit_the_processes_is_refused_before_they_meet(
    tiny, prepared, monkeypatch, tmp_path
):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    expected = "3 processes were started, and parallel.tensor = 2 .* start 2 or 4"
    words = ("--data.path", prepared, "--run.dir", tmp_path / "run", "--parallel.tensor", "2")
    with pytest.raises(UserError, match=expected):
        run("train", tiny.file, *words)
    assert not (tmp_path / "run").exists()
