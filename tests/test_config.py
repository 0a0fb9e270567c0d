from pathlib import Path

import pytest
import yaml

from bitlm_dist.config_loading import (
    CONFIGS,
    all_keys,
    flatten,
    load_config,
    load_run_config,
    to_yaml,
    unflatten,
)
from bitlm_dist.errors import UserError
from bitlm_dist.model.heads.config import BitLMHeadConfig
from bitlm_dist.renamed_keys import REMOVED_KEYS, RENAMED_KEYS, last_name

# Each old name of a key with its name of today.
NAMES_NOW = {old: last_name(old) for old in RENAMED_KEYS if last_name(old) not in REMOVED_KEYS}


def test_layers_win_in_order_and_are_remembered(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("preset: paper\nmodel: {block_size: 2}\ntraining: {steps: 7, seed: 1}\n")
    loaded = load_config(
        file,
        ["--training.steps", "9", "--optimizer.adamw_lr=2e-4", "--optimizer.betas", "[0.8, 0.9]"],
    )
    c = loaded.config
    assert (c.diffusion.loss, c.model.block_size, c.training.seed, c.training.steps) == (
        "x",
        2,
        1,
        9,
    )
    assert (c.optimizer.adamw_lr, c.optimizer.betas) == (2e-4, (0.8, 0.9))
    assert loaded.sources["diffusion.loss"] == "preset paper"
    assert loaded.sources["training.seed"] == f"{file}:3"
    assert loaded.sources["training.steps"] == "command line"
    assert "training.precision" not in loaded.sources


def test_the_preset_paper_is_the_literal_paper():
    c = load_config(None, ["--preset", "paper"]).config
    values = dict(flatten(c.model_dump()))

    expected = {
        "model.codes": "natural",
        "diffusion.loss": "x",
        "diffusion.time_distribution": "uniform",
        "diffusion.num_noise_samples": 1,
        "diffusion.per_token_noise_prob": 0.0,
        "head.kind": "paper",
        "diffusion.context_loss_weight": 0.0,
        "diffusion.autoregressive_loss_weight": 0.0,
        "diffusion.next_token_loss_weight": 0.0,
        "sampling.sampler": "ode",
        "sampling.steps": 15,
        "sampling.guidance": 9.0,
        "optimizer.matrix_optimizer": "adamw",
        "optimizer.adamw_lr": 1e-4,
        "optimizer.betas": (0.9, 0.95),
    }
    assert {key: values[key] for key in expected} == expected


def test_the_default_is_the_recipe():
    c = load_config(None).config
    assert c.head == BitLMHeadConfig(bits_per_group=6, num_mixture_components=8)
    assert (c.model.codes, c.optimizer.matrix_optimizer) == ("octave", "muon")
    assert 0.5 <= c.diffusion.per_token_noise_prob <= 0.7
    assert c.sampling.sampler == "sequential"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_configs_load(file):
    assert load_config(Path(file.stem)).config == load_config(file).config


def test_a_saved_config_reads_back(tmp_path):
    config = load_config(Path("quickstart"), ["--preset", "paper"]).config
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_run_config(tmp_path) == config
    of_other_heads = {"head.bits_per_group", "head.num_mixture_components", "head.ablation"}
    keys = set(dict(flatten(yaml.safe_load(to_yaml(config)))))
    assert keys == set(all_keys()) - of_other_heads


def test_every_key_that_scripts_rely_on_exists():
    promised = "run.dir training.steps training.seed training.global_batch_tokens data.path "
    promised += "model.block_size model.output parallel.tensor parallel.sequence "
    promised += "parallel.pipeline parallel.virtual_pipeline parallel.context"
    assert set(promised.split()) | {"parallel.head.zero_stage", "checkpoint.every_steps"} <= set(
        all_keys()
    )


BAD = [
    (
        ["--model.blok_size", "4"],
        r"unknown key model.blok_size \(command line\): did you mean model.block_size\?",
    ),
    (["--block_size", "4"], "unknown key block_size .*: did you mean model.block_size"),
    (["--zzz", "4"], "unknown key zzz .*: `bitlm train CONFIG --print-config` lists every key"),
    (["--model", "4"], "model .* is a section"),
    (
        ["--training.steps", "0"],
        r"training.steps = 0 \(command line\): expected at least 1",
    ),
    (["--training.steps", "many"], "training.steps = many"),
    (["--diffusion.loss", "mse"], "diffusion.loss = mse.*'x', 'v', 'bce' or 'elbo'"),
    (["--model.output", "softmx"], "model.output = softmx"),
    (
        ["--model.output", "softmax", "--model.block_size", "2"],
        "model.block_size = 2: model.output = softmax writes one token",
    ),
    (
        ["--model.input", "table", "--diffusion.input_bit_flips", "0.1"],
        "input_bit_flips = 0.1 needs model.input = bits",
    ),
    (["--training.steps"], "--training.steps lacks a value"),
    (["training.steps", "5"], "unexpected argument 'training.steps'"),
    (["--head.hidden_size", "130"], "head.num_heads = 4 must divide head.hidden_size = 130"),
    (
        ["--data.sequence_length", "255"],
        "data.sequence_length = 255 must be a multiple of model.block_size = 4.*: try 256",
    ),
    (["--data.sequence_length", "4"], "at least two blocks"),
    (
        ["--training.global_batch_tokens", "1000"],
        "must be a multiple of data.sequence_length = 256: try 1024",
    ),
    (
        ["--model.backbone.num_kv_heads", "3"],
        "model.backbone.num_kv_heads = 3 must divide model.backbone.num_heads = 4",
    ),
    (["--model.backbone.head_dim", "31"], "must be even"),
    (["--head.num_adaln_layers", "9"], "head.num_adaln_layers = 9 exceeds head.num_layers"),
    (["--diffusion.loss", "x"], "diffusion.loss = x: head.kind = bitlm is trained with bce"),
    (
        ["--preset", "paper", "--diffusion.loss", "bce"],
        "diffusion.loss = bce: head.kind = paper is trained with x, v or elbo",
    ),
    (
        ["--head.kind", "paper"],
        "diffusion.context_loss_weight = 1.0: head.kind = paper has no such loss: use 0",
    ),
    (
        ["--preset", "paper", "--head.bits_per_group", "4"],
        r"head.bits_per_group = 4 \(command line\): head.kind = paper has no such key",
    ),
    (["--head.kind", "none"], "head.kind = none .*: expected 'bitlm', 'paper' or 'ablation'"),
    (
        ["--diffusion.autoregressive_loss_weight", "0"],
        "diffusion.autoregressive_loss_weight = 0 leaves a part of the head untrained",
    ),
    (
        ["--diffusion.detached_losses", "[noise]"],
        "diffusion.detached_losses.0 = noise .*: expected 'denoising'",
    ),
    (["--sampling.guidance", "3"], "sampling.guidance = 3.0 needs a trained null state"),
    (
        [
            *("--head.kind", "ablation", "--diffusion.per_token_noise_prob", "0"),
            *("--diffusion.autoregressive_loss_weight", "0"),
        ],
        "sampling.sampler = sequential needs",
    ),
    (["--sampling.sampler", "sde", "--sampling.steps", "1"], "the sde sampler needs at least 2"),
    (
        ["--parallel.tensor", "3"],
        "model.backbone.num_heads = 4 cannot be split over parallel.tensor = 3 ranks: "
        "use one of 1, 2, 4",
    ),
    (
        ["--parallel.tensor", "4"],
        "model.backbone.num_kv_heads = 2 cannot be split over parallel.tensor = 4 ranks: "
        "use one of 1, 2",
    ),
    (["--parallel.sequence", "true"], "parallel.sequence = true splits over the tensor ranks"),
    (
        ["--parallel.virtual_pipeline", "2"],
        "parallel.virtual_pipeline = 2 needs parallel.pipeline > 1",
    ),
    (["--parallel.context", "3"], "must be a multiple of 24, e.g. 264"),
    (
        ["--parallel.pipeline", "8"],
        "model.backbone.num_layers = 4 is too few for "
        "parallel.pipeline x virtual_pipeline = 8 stages",
    ),
    (
        ["--parallel.pipeline", "2", "--parallel.layers_per_stage", "[3, 2]"],
        "that add up to model.backbone.num_layers = 4",
    ),
    (["--preset", "papper"], "preset = papper"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_values_are_one_line_that_names_key_and_remedy(words, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(None, words)
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(
        UserError, match=r"nothing.yaml does not exist; shipped with the package: .*quickstart"
    ):
        load_config(tmp_path / "nothing.yaml")
    file = tmp_path / "bad.yaml"
    for content, message in (
        ("a: [1", "is no valid YAML"),
        ("- 1\n", "must hold `key: value` lines"),
        ("modle: {x: 1}", "unknown key modle.x"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            load_config(file)


def test_every_renamed_key_has_a_name_now_and_no_other():
    keys = set(all_keys())
    assert set(NAMES_NOW.values()) <= keys
    assert not set(RENAMED_KEYS) & keys
    assert len(set(RENAMED_KEYS.values())) == len(RENAMED_KEYS)


@pytest.mark.parametrize("old", NAMES_NOW)
def test_an_old_key_is_refused_with_its_new_name(old, tmp_path):
    """Even in a file config.yaml, if its folder is no run."""
    file = tmp_path / "config.yaml"
    value = dict(flatten(load_config(None).config.model_dump(mode="json")))[NAMES_NOW[old]]
    for text in (f"{old}: {value}", yaml.safe_dump(unflatten({old: value}))):
        file.write_text(text)
        line = len(text.splitlines())

        with pytest.raises(UserError, match=f"renamed to {NAMES_NOW[old]}$") as caught:
            load_config(file)
        assert str(caught.value).startswith(f"unknown key {old} ({file}:{line}): ")
    for words in ([f"--{old}", str(value)], [f"--{old}={value}"]):
        with pytest.raises(UserError, match=f"renamed to {NAMES_NOW[old]}$") as caught:
            load_config(None, words)
        assert str(caught.value).startswith(f"unknown key {old} (command line): ")
        assert "\n" not in str(caught.value)


def of_an_earlier_version(config):
    """Serialize a config as the version before the renaming did."""
    old_names = {new: old for old, new in NAMES_NOW.items()}
    values = dict(flatten(yaml.safe_load(to_yaml(config))))
    return yaml.safe_dump(
        unflatten({old_names.get(key, key): value for key, value in values.items()})
    )


def test_a_removed_key_is_dropped_where_bitlm_wrote_it(tmp_path):
    (tmp_path / "config.yaml").write_text("optimizer: {fused: auto, ema: 0.9}")
    with pytest.raises(UserError, match=r"optimizer.fused \(.*:1\): it was removed: AdamW is"):
        load_run_config(tmp_path)

    (tmp_path / "environment.json").write_text("{}")
    assert load_run_config(tmp_path) == load_config(None, ["--optimizer.ema", "0.9"]).config


@pytest.mark.parametrize("beside", ["environment.json", "export.json", "settings.json"])
def test_what_an_earlier_version_wrote_loads_in_silence(beside, tmp_path, capsys, caplog, recwarn):
    words = ["--optimizer.adamw_lr", "1e-05", "--parallel.activation_checkpointing", "full"]
    words += ["--model.backbone.num_layers", "6", "--evaluation.use_ema", "true"]
    config = load_config(None, [*words, "--optimizer.ema", "0.9"]).config
    (tmp_path / "config.yaml").write_text(of_an_earlier_version(config))

    # by itself the file might be a user's
    with pytest.raises(UserError, match="renamed to"):
        load_run_config(tmp_path)
    (tmp_path / beside).write_text("{}")
    assert load_run_config(tmp_path) == config

    loaded = load_config(tmp_path / "config.yaml", ["--optimizer.adamw_lr=0.5"])
    assert loaded.config == config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"adamw_lr": 0.5})}
    )
    assert loaded.sources["optimizer.adamw_lr"] == "command line"
    assert loaded.sources["optimizer.matrix_optimizer"].startswith(str(tmp_path / "config.yaml"))

    # old names on the command line are a user's in any case
    with pytest.raises(UserError, match="renamed to optimizer.adamw_lr"):
        load_run_config(tmp_path, ["--optimizer.lr", "0.5"])
    assert (capsys.readouterr(), caplog.records, list(recwarn)) == (("", ""), [], [])
