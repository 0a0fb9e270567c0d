from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from bitlm_dist.config import Config, warnings_of
from bitlm_dist.config_loading import all_keys, build_config, load_config
from bitlm_dist.errors import UserError
from bitlm_dist.launch.cluster import load_cluster
from bitlm_dist.yaml_files import annotation_of, parse_override, read_yaml_file

TEXT = annotation_of(Config, "logging.wandb_project")
REFUSED = [
    (
        "optimizer:\n  adamw_lr: 0.001\n  adamw_lr: 0.1",
        "optimizer.adamw_lr is set twice, in line 2 and 3",
    ),
    (
        "training: {steps: 5}\nmodel: {bits: 9}\ntraining: {seed: 1}",
        "training is set twice, in line 1 and 3",
    ),
    ("training: {steps: 5}\n\ntraining.steps: 6", "training.steps is set twice, in line 1 and 3"),
    (
        "model.backbone: {num_layers: 1}\nmodel:\n  backbone: {hidden_size: 8}",
        "model.backbone is set twice, in line 1 and 3",
    ),
    ("training.steps: 6\ntraining: null", "training is set twice, in line 1 and 2"),
    (
        "data:\n  sources:\n  - {path: a, weight: 1,\n     weight: 2}",
        "data.sources.0.weight is set twice, in line 3 and 4",
    ),
    ("on: 1\non: 2", "on is set twice"),
    (
        "training:\n  steps: 0100",
        r"training.steps = 0100 \(FILE:2\): YAML reads a leading zero as octal",
    ),
    ("training: {seed: 0900}", r"training.seed = 0900 \(FILE:1\)"),
    ("training: {steps: 1:30}", r"training.steps = 1:30 \(FILE:1\): YAML reads colons as base 60"),
    (
        "checkpoint: {every_minutes: 1:30.5}",
        r"checkpoint.every_minutes = 1:30.5 \(FILE:1\): YAML reads colons",
    ),
    (
        "parallel: {pipeline: 2, layers_per_stage: [010, 2]}",
        r"parallel.layers_per_stage.0 = 010 \(FILE:1\)",
    ),
    (
        "data: {path: d, sources: [{path: d, weight: [[0, 1], [00, 1]]}]}",
        "data.sources.0.weight.1.0 = 00",
    ),
    (
        "training:\n  steps: true",
        r"training.steps = true \(FILE:2\): expected another value than true or false",
    ),
    (
        "optimizer: {betas: [0.9, on]}",
        r"optimizer.betas = .*true.* \(FILE:1\): expected another value",
    ),
    (
        "optimizer:\n  adamw_lr: .inf",
        r"optimizer.adamw_lr = .inf \(FILE:2\): expected a finite number",
    ),
    ("optimizer: {eps: .nan}", "optimizer.eps = .nan .*finite number"),
    ("optimizer: {adamw_lr: 1e999}", "optimizer.adamw_lr = .*finite number"),
    ("optimizer: {betas: [0.9, .nan]}", "optimizer.betas.1 = .nan .*finite number"),
    (
        "data: {path: d, sources: [{path: d, weight: .inf}]}",
        r"data.sources.0.weight.* \(FILE:1\): .*finite",
    ),
    (
        "optimizer:\n  betas: [1.5, 2.0]",
        r"optimizer.betas.0 = 1.5 \(FILE:2\): expected less than 1",
    ),
    ("optimizer: {betas: [0.9, -0.1]}", "optimizer.betas.1 = -0.1 .*at least 0"),
    ("run: {dir: }", r"run.dir = null \(FILE:1\): expected a path"),
    (
        "data: {path: $NOT_SET/x}",
        r"data.path = \$NOT_SET/x \(FILE:1\): the variable \$NOT_SET is not set",
    ),
    (
        "data: {path: d, sources: [{path: ~nobody-has-this/x, weight: 1}]}",
        "data.sources.0.path = .* there is no home folder",
    ),
    ("training: &x [*x]", "an anchor refers to itself"),
    ("? [a]\n: 1", "a key must be a word"),
    ("training: {steps: !!python/none 1}", "is no valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_what_means_something_else_is_refused_with_its_line(tmp_path, text, message):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message.replace("FILE", str(file))) as caught:
        load_config(file)
    assert "\n" not in str(caught.value)


def test_no_number_is_a_boolean_or_infinite():
    numbers = [key for key in all_keys() if annotation_of(Config, key) in (int, float)]
    assert len(numbers) > 40
    for key in numbers:
        for value in (True, float("inf"), float("nan")):
            with pytest.raises(UserError, match=f"{key} = "):
                build_config({key: value})


def test_what_text_and_paths_get(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "x.yaml"
    file.write_text(
        "run: {dir: 2024-01-01}\n"
        "data:\n  path: ~/data\n  cache: ${here}/cache\n"
        "logging: {wandb_project: on}\n"
    )
    config = load_config(file).config
    assert (config.run.dir, config.data.path) == (Path("2024-01-01"), Path("/home/me/data"))
    assert (config.data.cache, config.logging.wandb_project) == (tmp_path / "cache", "on")

    file.write_text("base: &base {seed: 3, steps: 9}\ntraining: {<<: *base, steps: 5}\n")
    found = read_yaml_file(file, Config)
    assert (found["training.seed"].value, found["training.steps"].value) == (3, 5), (
        "a key beside << is no second one"
    )


@pytest.mark.parametrize(
    "text",
    ["2024-01-01", "0123", "on", "a: b", "[x]", "1:30", "a #b", "&x", "nan", "'", "- a", "1e3"],
)
def test_words_for_text_stay_as_they_are(text):
    config = load_config(
        None, ["--run.dir", text, f"--logging.wandb_project={text}", "--data.path", text]
    ).config
    assert (config.run.dir, config.data.path, config.logging.wandb_project) == (
        Path(text),
        Path(text),
        text,
    )


def test_words_for_other_fields(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = [
        "--data.path=~/d",
        "--data.cache",
        "null",
        "--parallel.layers_per_stage",
        "[4]",
        "--logging.wandb_project",
        "'null'",
    ]
    config = load_config(None, [*words, "--data.sources", "[{path: ~/d, weight: 1}]"]).config
    assert (config.data.path, config.data.cache) == (Path("/home/me/d"), None)
    assert (config.parallel.layers_per_stage, config.logging.wandb_project) == ((4,), "null")
    assert config.data.sources[0].path == Path("/home/me/d")

    for words, message in (
        (
            ["--training.steps", "0100"],
            r"training.steps = 0100 \(command line\): YAML reads a leading zero",
        ),
        (["--training.steps", "1:30"], "base 60"),
        (["--training.steps", "yes"], "expected another value than true"),
        (["--optimizer.adamw_lr", ".inf"], "finite number"),
        (["--optimizer.adamw_lr", "inf"], "finite number"),
        (["--data.path", "$NOT_SET"], r"data.path = \$NOT_SET \(command line\): the variable"),
        (["--run.dir", ""], "run.dir = null"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(None, words)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8))
@example("0x1")
@example("null ")
def test_text_survives_the_command_line_and_a_file(tmp_path_factory, text):
    if text[0] not in "'\"" and text not in ("~", "null", "Null", "NULL"):
        assert parse_override(text, "logging.wandb_project", TEXT) == text
    file = tmp_path_factory.getbasetemp() / "text.yaml"
    file.write_text(yaml.safe_dump({"logging": {"wandb_project": text}}, allow_unicode=True))
    assert load_config(file).config.logging.wandb_project == text


def test_clusters_are_read_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "c.yaml"

    def cluster(text: str) -> Any:
        file.write_text(text)
        return load_cluster(str(file), {})

    assert cluster("time: 24:00:00").walltime_seconds == 86_400, "text, not a number in base 60"
    assert cluster("env: {A: on, B: 0123, C: 8}").env == {"A": "on", "B": "0123", "C": "8"}
    found = cluster(
        "python: ~/venv/bin/python\n"
        "container: {runtime: pyxis, image: $HOME/x.sqsh, mounts: [~/d:/d]}"
    )
    assert (found.python, found.container.image) == ("/home/me/venv/bin/python", "/home/me/x.sqsh")
    assert found.container.mounts == ("/home/me/d:/d",)

    for text, message in (
        ("qos: a\nqos: b", "qos is set twice, in line 1 and 2"),
        (
            "preflight: {gemm: .nan}",
            r"preflight.gemm = .nan \(.*c.yaml:1\): expected a finite number",
        ),
        ("gpus_per_node: 010", "gpus_per_node = 010 .*octal"),
        ("gpus_per_node: true", "gpus_per_node = true .*expected another value"),
        ("watch: {startup_timeout: .inf}", "watch.startup_timeout = .inf .*finite"),
        ("env: {A: 1, A: 2}", "env.A is set twice"),
        ("python: $NOT_SET/python", "python = .*is not set"),
    ):
        with pytest.raises(UserError, match=message):
            cluster(text)


def test_a_warm_up_beyond_the_end_is_a_warning():
    (warning,) = warnings_of(
        load_config(None, ["--optimizer.warmup_steps", "11", "--training.steps", "10"]).config
    )
    assert warning.startswith("optimizer.warmup_steps = 11 is beyond training.steps = 10")
    assert not list(
        warnings_of(
            load_config(None, ["--optimizer.warmup_steps", "10", "--training.steps", "10"]).config
        )
    )


@pytest.mark.parametrize(
    ("words", "num_warnings"),
    [
        (["--diffusion.detached_losses", "[denoising, context, autoregressive]"], 0),
        (["--diffusion.detached_losses", "[denoising, context, autoregressive, next_token]"], 1),
        (["--preset", "paper", "--diffusion.detached_losses", "[denoising]"], 1),
    ],
)
def test_a_backbone_without_a_loss_is_a_warning(words, num_warnings):
    warnings = list(warnings_of(load_config(None, words).config))
    assert warnings == num_warnings * [
        "diffusion.detached_losses names all losses: the backbone learns nothing"
    ]
