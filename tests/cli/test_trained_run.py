import json
import subprocess
import sys

import pytest

from bitlm_dist.cli.trained_run import is_changeable, load_trained_config
from bitlm_dist.config_loading import all_keys, flatten, load_config, load_run_config, to_yaml
from bitlm_dist.errors import UserError

# What evaluating and generating may change: all else is the model, its training or another run.
CHANGEABLE = {
    "evaluation.use_ema": "true",
    "evaluation.num_sequences": "8",
    "sampling.sampler": "ode",
    "sampling.steps": "3",
    "parallel.micro_batch_size": "2",
    "logging.tensorboard": "true",
    "data.path": "elsewhere",
    "data.cache": "here",
    "data.cache_limit": "3gb",
    "data.workers": "2",
    "model.backbone.attention": "reference",
}


@pytest.fixture
def run_folder(tiny_file, tmp_path):
    config = load_config(tiny_file, ["--run.dir", str(tmp_path)]).config
    (tmp_path / "config.yaml").write_text(to_yaml(config, in_run_folder=True))
    return tmp_path


@pytest.mark.parametrize("key", [key for key in all_keys() if not is_changeable(key)])
def test_keys_of_the_model_and_its_training_are_refused(key, run_folder):
    expected = f"--{key} .*: `bitlm eval` takes evaluation"
    with pytest.raises(UserError, match=expected):
        load_trained_config(run_folder, [f"--{key}", "1"], "eval")


def test_what_may_be_changed_changes_nothing_else(run_folder):
    sections = {key.partition(".")[0] for key in all_keys() if is_changeable(key)}
    assert sections == {key.partition(".")[0] for key in CHANGEABLE}

    words = [f"--{key}={value}" for key, value in CHANGEABLE.items()]
    before, after = (
        dict(flatten(config.model_dump()))
        for config in (
            load_run_config(run_folder),
            load_trained_config(run_folder, words, "generate"),
        )
    )
    assert {key for key, value in after.items() if before[key] != value} == CHANGEABLE.keys()


def test_why_a_key_is_refused(run_folder):
    for key, words in {
        "model.backbone.num_layers": "describes the trained model, which stays as it is: `bitlm",
        "diffusion.loss": "describes the trained model",
        "preset": "describes the trained model",
        "optimizer.ema": "is a key of training",
        "data.sequence_length": "is a key of training",
    }.items():
        with pytest.raises(UserError, match=f"^--{key} {words}"):
            load_trained_config(run_folder, [f"--{key}", "1"], "eval")

    # What is no key gets the hint that every command gives.
    with pytest.raises(UserError, match="temperature .*: did you mean sampling.temperature"):
        load_trained_config(run_folder, ["--temperature", "1"], "eval")


def test_a_checkpoint_is_no_run(run_folder):
    checkpoint = run_folder / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    expected = f"{checkpoint} is no run folder but a checkpoint in one: name {run_folder}, whose"
    with pytest.raises(UserError, match=expected):
        load_trained_config(checkpoint, [], "generate")


COMMANDS = """
import contextlib, io, json, sys
from bitlm_dist.__main__ import main

found = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["bitlm", *words]
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main()
        except SystemExit as end:
            found.append((end.code, errors.getvalue(), "torch" in sys.modules))
print(json.dumps(found))
"""


def test_what_only_looks_at_words_and_files_is_said_before_torch_is_loaded(run_folder):
    """In a process of its own, as this one has loaded torch."""
    run = str(run_folder)
    rows = [
        (["eval", "nosuch"], "is no run folder"),
        (["eval", run], "data.path is not set"),
        (["eval", run, "--data.path", run], "holds no shards"),
        (["eval", run, "--training.steps", "3"], "is a key of training"),
        (["generate", "nosuch"], "is no run folder"),
        (["generate", run], "holds no checkpoint yet"),
        (["generate", run, "--watch", "--json"], "exclude each other"),
        (["compare", "nosuch"], "is no run folder"),
        (["compare", run], "holds no evaluations"),
        (["compare", run, "--plot", f"{run}/none/x.svg"], "no such file or directory"),
    ]
    command = [sys.executable, "-c", COMMANDS, json.dumps([words for words, _ in rows])]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    for (words, expected), (code, errors, has_torch) in zip(rows, json.loads(output), strict=True):
        assert (code, errors.count("\n"), has_torch) == (2, 1, False), words
        assert expected in errors
