"""`bitlm train` as a command: what it prints, and its exit code."""

import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.cli import app
from bitlm_dist.cli.train import _format_epochs, _loss_unit
from bitlm_dist.config_loading import load_config
from bitlm_dist.errors import UserError
from bitlm_dist.training import metrics
from bitlm_dist.training.metrics import MetricsLog
from bitlm_dist.training.run_folder import RunFolder

pytestmark = pytest.mark.integration


@pytest.fixture
def train(tiny_file, prepared, tmp_path):
    """Runs the command into a run folder, and returns exit code and output."""

    def run(*words, **environment):
        line = ["train", str(tiny_file), "--run.dir", str(tmp_path / "run")]
        line += ["--data.path", str(prepared), *words]
        result = CliRunner(env={"COLUMNS": "240", **environment}).invoke(app, line)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


def test_a_run_says_what_it_does_and_what_comes_next(train, tmp_path):
    run = tmp_path / "run"
    words = ("--evaluation.every_steps", "3", "--evaluation.num_samples", "1")
    words += ("--evaluation.num_sequences", "2", "--evaluation.num_sampled_blocks", "4")
    code, output = train(*words)
    lines = output.splitlines()
    assert code == 0
    assert lines[0] == f"bitlm train: {run}: loading torch…"
    assert " step 1/6  loss " in output
    assert " step 3: validation " in output
    assert "training loss, nats per bit, summed over its terms" in lines
    assert lines[-1] == (
        f"trained: step 6 of 6, checkpoint {run}/checkpoints/step-00000006; next: bitlm eval {run}"
    )

    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert last["time"] > first["time"] > os.stat(run / "codes.npz").st_mtime - 60
    assert 0 <= last["data_wait_seconds"] < last["seconds"]
    assert last["host_memory_peak_bytes"] >= last["host_memory_bytes"] > 10**8
    assert last["device_memory_bytes"] is last["device_memory_peak_bytes"] is None
    assert (last["lr_adamw"], last["lr_muon"]) == (
        pytest.approx(3e-3 * last["lr_factor"]),
        pytest.approx(0.02 * last["lr_factor"]),
    )

    evaluation = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert (evaluation["by"], evaluation["split"], evaluation["step"]) == ("train", "validation", 6)
    assert evaluation["scored"]["tokens"] == evaluation["validation"]["tokens"]

    # again, it is done without loading torch
    assert train(*words) == (0, f"{run} is trained: step 6 of 6\n")
    assert train(*words, "--quiet") == (0, "")
    assert train("--evaluation.num_noise_levels", "2")[1].endswith("is trained: step 6 of 6\n")


def test_quiet_leaves_warnings_alone(train):
    code, output = train("--quiet", "--training.steps", "1")
    assert code == 0
    assert [line for line in output.splitlines() if not line.startswith("warning: ")] == []
    assert "warning: optimizer.warmup_steps = 2 is beyond training.steps = 1" in output


@pytest.mark.parametrize(
    ("launched", "number", "code"),
    [(False, signal.SIGTERM, 75), (False, signal.SIGINT, 75), (True, signal.SIGTERM, 0)],
)
def test_a_run_that_is_stopped_saves_and_tells_its_exit_code(
    train, tmp_path, monkeypatch, launched, number, code
):
    write = MetricsLog.write

    def stop(self, metrics):
        write(self, metrics)
        if metrics["step"] == 1:  # written while step 2 is under way
            signal.raise_signal(number)

    monkeypatch.setattr(metrics.MetricsLog, "write", stop)
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} if launched else {}
    found, output = train("--training.steps", "50", **ranks)
    assert found == code
    last = output.splitlines()[-1]
    assert last == f"{number.name}: saved at step 2; the same command goes on from there"
    assert complete_steps(tmp_path / "run" / "checkpoints") == [2]


def test_a_start_that_took_no_step_leaves_the_folder_to_another_config(
    train, tmp_path, monkeypatch, corpus
):
    from bitlm_dist.data_prep.prepare import prepare

    def refuse(self):
        raise UserError("W&B does not start")

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "_open_trackers", refuse)
        with pytest.raises(UserError, match="W&B does not start"):
            train("--training.steps", "2")
        assert not (tmp_path / "run").exists()

        # a killed process does not clean up
        patch.setattr(RunFolder, "_remove_metadata", lambda self: None)
        with pytest.raises(UserError, match="W&B does not start"):
            train("--training.steps", "2")
    assert (tmp_path / "run" / "config.yaml").is_file()

    prepare([corpus], "bpe:310", tmp_path / "other", validation_fraction=0.1)
    words = ("--data.path", str(tmp_path / "other"), "--training.steps")
    code, output = train(*words, "3")
    assert code == 0
    assert "trained: step 3 of 3" in output
    tokenizer = json.loads((tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text())
    assert len(tokenizer["model"]["vocab"]) > 300, "the one of the run, not of the failed start"

    with pytest.raises(UserError, match="holds a run with training.steps = 3, now 4"):
        train(*words, "4")


def test_a_disk_that_is_full_at_the_first_step_keeps_nothing(train, small_disk, monkeypatch):
    """The folder is locked, the model is made, and then nothing can be written."""
    from bitlm_dist.training import run_folder

    write = run_folder.write_atomically

    def fill_then_write(file, text):
        if file.name == "environment.json":
            filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT)
            for size in (2**16, 2**12, 1):
                try:
                    while True:
                        os.write(filler, bytes(size))
                except OSError:
                    pass
            os.close(filler)
        write(file, text)

    monkeypatch.setattr(run_folder, "write_atomically", fill_then_write)
    message = "run.dir.* cannot be used: .*no space left on device: make room on that disk"
    with pytest.raises(UserError, match=message) as caught:
        train("--run.dir", str(small_disk / "new" / "run"), "--checkpoint.keep", "1")
    assert "\n" not in str(caught.value)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize(
    ("words", "unit"),
    [
        ("", "nats per bit, summed over its terms"),
        ("--preset paper", "squared error, plus nats per bit, summed over its terms"),
        ("--model.output softmax", "nats per token"),
    ],
)
def test_the_unit_of_the_loss_is_that_of_the_objective(words, unit):
    assert _loss_unit(load_config(None, words.split()).config) == unit


def test_epochs_are_numbers_without_an_exponent(tiny):
    epochs = {"epochs/a": 0.0123456, "epochs/b": 999.6, "epochs": 12345.6}
    config = tiny("--data.path", "texts", "--training.steps", "1")
    assert _format_epochs(epochs, config) == (
        "1 step: 0.0123 epochs of a, 1,000 epochs of b, 12,346 epochs of texts"
    )


def test_the_first_line_comes_before_torch_and_ctrl_c_before_training_leaves_nothing(
    tiny_file, prepared, tmp_path
):
    """The real command, interrupted as soon as it says that it loads torch."""
    words = ["--run.dir", "run", "--data.path", str(prepared)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitlm_dist", "train", str(tiny_file), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout.readline() == "bitlm train: run: loading torch…\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "bitlm: interrupted")
    assert list(tmp_path.iterdir()) == []
