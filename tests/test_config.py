from pathlib import Path

import pytest
import yaml

from bitlm_dist.config_loading import CONFIGS, flatten, keys, load, read_run, to_yaml
from bitlm_dist.errors import UserError


def test_layers_win_in_order_and_are_remembered(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("preset: paper\nmodel: {block_size: 2}\ntraining: {steps: 7, seed: 1}\n")
    loaded = load(file, ["--training.steps", "9", "--optimizer.lr=2e-4", "--optimizer.betas", "[0.8, 0.9]"])
    c = loaded.config
    assert (c.diffusion.loss, c.model.block_size, c.training.seed, c.training.steps) == ("x", 2, 1, 9)
    assert (c.optimizer.lr, c.optimizer.betas) == (2e-4, (0.8, 0.9))
    assert loaded.sources["diffusion.loss"] == "preset paper"
    assert loaded.sources["training.seed"] == f"{file}:3"
    assert loaded.sources["training.steps"] == "command line"
    assert "training.precision" not in loaded.sources


def test_the_preset_paper_is_the_literal_paper():
    c = load(None, ["--preset", "paper"]).config
    d, h, s, o = c.diffusion, c.head, c.sampling, c.optimizer
    assert (c.model.codes, d.loss, d.time, d.draws, d.per_token) == ("natural", "x", "uniform", 1, 0.0)
    assert (h.output, h.squash, h.channel_skip, h.context_logits, h.posterior_input) == (
        "bits",
        "none",
        False,
        False,
        False,
    )
    assert (s.sampler, s.steps, s.guidance, o.matrices, o.lr, o.betas) == ("ode", 15, 9.0, "adamw", 1e-4, (0.9, 0.95))


def test_the_default_is_the_recipe():
    c = load(None).config
    assert (c.model.codes, c.head.output, c.head.group, c.head.components) == ("octave", "mixture", 6, 8)
    assert (c.head.context_logits, c.head.posterior_input, c.optimizer.matrices) == (True, True, "muon")
    assert 0.5 <= c.diffusion.per_token <= 0.7
    assert c.sampling.sampler == "sequential"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_configs_load(file):
    assert load(Path(file.stem)).config == load(file).config


def test_a_saved_config_reads_back(tmp_path):
    config = load(Path("quickstart"), ["--preset", "paper"]).config
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_run(tmp_path) == config
    assert set(dict(flatten(yaml.safe_load(to_yaml(config))))) == set(keys())


def test_every_key_that_scripts_rely_on_exists():
    promised = "run.dir training.steps training.seed training.global_batch_tokens model.block_size model.output data.path"
    promised += " parallel.tensor parallel.sequence parallel.pipeline parallel.virtual_pipeline parallel.context"
    assert set(promised.split()) | {"head.zero_stage", "checkpoint.every_steps"} <= set(keys())


BAD = [
    (["--model.blok_size", "4"], r"unknown key model.blok_size \(command line\): did you mean model.block_size\?"),
    (["--block_size", "4"], "unknown key block_size .*: did you mean model.block_size"),
    (["--zzz", "4"], "unknown key zzz .*: `bitlm train CONFIG --print-config` lists every key"),
    (["--model", "4"], "model .* is a section"),
    (["--training.steps", "0"], r"training.steps = 0 \(command line\): input should be greater than or equal to 1"),
    (["--training.steps", "many"], "training.steps = 'many'"),
    (["--diffusion.loss", "mse"], "diffusion.loss = 'mse'.*'x', 'v', 'bce' or 'elbo'"),
    (["--model.output", "softmx"], "model.output = 'softmx'"),
    (["--model.output", "softmax", "--model.block_size", "2"], "model.block_size = 2: model.output = softmax writes one token"),
    (["--model.input", "table", "--diffusion.input_bit_flips", "0.1"], "input_bit_flips = 0.1 needs model.input = bits"),
    (["--training.steps"], "--training.steps lacks a value"),
    (["training.steps", "5"], "unexpected argument 'training.steps'"),
    (["--head.width", "130"], "head.heads = 4 must divide head.width = 130"),
    (
        ["--data.sequence_length", "255"],
        "data.sequence_length = 255 must be a multiple of model.block_size = 4.*: try 256",
    ),
    (["--data.sequence_length", "4"], "at least two blocks"),
    (["--training.global_batch_tokens", "1000"], "must be a multiple of data.sequence_length = 256: try 1024"),
    (["--model.backbone.kv_heads", "3"], "model.backbone.kv_heads = 3 must divide model.backbone.heads = 4"),
    (["--model.backbone.head_width", "31"], "must be even"),
    (["--head.modulations", "9"], "head.modulations = 9 exceeds head.layers"),
    (["--diffusion.loss", "x"], "diffusion.loss = x needs head.output = bits"),
    (["--head.context_logits", "false"], "head.posterior_input = true needs head.context_logits = true"),
    (
        ["--head.context_logits", "false", "--head.posterior_input", "false"],
        "head.shared_readout = true needs head.context_logits = true",
    ),
    (["--sampling.guidance", "3"], "sampling.guidance = 3.0 needs a trained null state"),
    (["--diffusion.per_token", "0", "--diffusion.chain", "0"], "sampling.sampler = sequential needs"),
    (["--sampling.sampler", "sde", "--sampling.steps", "1"], "the sde sampler needs at least 2"),
    (["--parallel.tensor", "3"], "model.backbone.heads = 4 cannot be split over parallel.tensor = 3 ranks: use one of 1, 2, 4"),
    (["--parallel.tensor", "4"], "model.backbone.kv_heads = 2 cannot be split over parallel.tensor = 4 ranks: use one of 1, 2"),
    (["--parallel.sequence", "true"], "parallel.sequence = true splits over the tensor ranks"),
    (["--parallel.virtual_pipeline", "2"], "parallel.virtual_pipeline = 2 needs parallel.pipeline > 1"),
    (["--parallel.context", "3"], "must be a multiple of 24, e.g. 264"),
    (["--parallel.pipeline", "8"], "model.backbone.layers = 4 is too few for parallel.pipeline x virtual_pipeline = 8 stages"),
    (["--parallel.pipeline", "2", "--parallel.layers_per_stage", "[3, 2]"], "that add up to model.backbone.layers = 4"),
    (["--preset", "papper"], "preset = 'papper'"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_values_are_one_line_that_names_key_and_remedy(words, message):
    with pytest.raises(UserError, match=message) as caught:
        load(None, words)
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing.yaml does not exist; shipped with the package: .*quickstart"):
        load(tmp_path / "nothing.yaml")
    file = tmp_path / "bad.yaml"
    for content, message in (
        ("a: [1", "is no valid YAML"),
        ("- 1\n", "must hold `key: value` lines"),
        ("modle: {x: 1}", "unknown key modle.x"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            load(file)
