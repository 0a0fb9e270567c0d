"""A run does not depend on the folder that it was started in, and not on its own place."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.cli import app
from bitlm_dist.config_loading import load_config, load_run_config, with_absolute_paths
from bitlm_dist.errors import UserError
from bitlm_dist.launch import submit
from bitlm_dist.launch.attempts import latest_checkpoint_step
from bitlm_dist.launch.status import is_trained
from bitlm_dist.training.trainer import Trainer

runner = CliRunner(env={"COLUMNS": "240"})
pytestmark = pytest.mark.integration
SCORE = (
    "--json",
    "--evaluation.num_noise_levels",
    "2",
    "--evaluation.num_sequences=4",
    "--evaluation.num_sampled_blocks",
    "0",
)


def run(*words):
    result = runner.invoke(app, [str(word) for word in words])
    if result.exception:
        raise result.exception
    return result.output


def tree(folder):
    """Every file but the lock, with what it holds and when it was written."""
    files = (
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.lock"
    )
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in files
    }


@pytest.fixture
def started(tiny, prepared, tmp_path, monkeypatch):
    """A folder to start in, with the data in it and the run's config file beside."""
    start = tmp_path / "start"
    shutil.copytree(prepared, start / "d")
    monkeypatch.chdir(start)
    (start / "tiny.yaml").write_text(tiny.file.read_text() + "run: {dir: runs/x}\n")
    return start


def train(file, *words, until=None):
    """As `bitlm train` with a schedule that later starts may lengthen -> the step it reached."""
    trainer = Trainer.build(
        load_config(Path(file), ["--optimizer.schedule", "constant", *words]).config
    ).open()
    trainer.fit(until=until)
    trainer.close()
    return trainer.step


def test_a_run_is_read_and_goes_on_from_any_folder(started, tmp_path, monkeypatch):
    train("tiny.yaml", "--data.path", "d", "--data.cache", "cache", "--training.steps", "2")
    saved = yaml.safe_load(Path("runs/x/config.yaml").read_text())
    assert saved["data"]["path"] == str(started / "d")
    assert saved["data"]["cache"] == str(started / "cache")
    expected = json.loads(run("eval", "runs/x", *SCORE))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = json.loads(run("eval", started / "runs" / "x", *SCORE))
    assert found.pop("run") != expected.pop("run")
    assert found == expected
    assert train(started / "runs/x/config.yaml", "--training.steps", "3") == 3
    assert complete_steps(started / "runs/x/checkpoints")[-1] == 3
    assert not any(Path.cwd().iterdir())


@pytest.mark.slow
def test_a_run_with_its_data_inside_can_be_moved(started, tmp_path):
    shutil.move("d", "runs/x/data")
    sources = "[{path: runs/x/data, weight: 1}]"
    train(
        "tiny.yaml",
        "--data.path",
        "runs/x/data",
        "--data.sources",
        sources,
        "--training.steps",
        "2",
    )
    text = Path("runs/x/config.yaml").read_text()
    assert str(started) not in text
    moved = tmp_path / "far" / "y$z"
    moved.parent.mkdir()
    shutil.move("runs/x", moved)
    config = load_run_config(moved)
    assert (config.run.dir, config.data.path, config.data.sources[0].path) == (
        moved,
        moved / "data",
        moved / "data",
    )
    assert json.loads(run("eval", moved, *SCORE))["step"] == 2
    assert train(moved / "config.yaml", "--training.steps", "3") == 3
    assert not Path("runs/x").exists()
    run("checkpoint", "export", moved, tmp_path / "out")
    assert load_run_config(tmp_path / "out").data.path == moved / "data"
    run("checkpoint", "import", tmp_path / "out", tmp_path / "back")
    assert load_run_config(tmp_path / "back").run.dir == tmp_path / "back"


@pytest.mark.slow
def test_an_old_run_folder_means_its_start_folder(started, tmp_path, monkeypatch):
    train("tiny.yaml", "--data.path", "d", "--training.steps", "2")
    file = started / "runs/x/config.yaml"
    old = yaml.safe_load(file.read_text())
    old["run"]["dir"], old["data"]["path"] = "runs/x", "d"
    file.write_text(yaml.safe_dump(old))
    assert json.loads(run("eval", "runs/x", *SCORE))["step"] == 2
    assert train("runs/x/config.yaml", "--training.steps", "3") == 3
    file.write_text(yaml.safe_dump(old))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"data.path = d \(from {tmp_path}\) does not exist"):
        run("eval", started / "runs" / "x", *SCORE)


@pytest.mark.slow
def test_sources_may_be_moved_as_data_may(started):
    sources = "[{path: NAME, weight: 1}]"
    train(
        "tiny.yaml",
        "--data.path",
        "d",
        "--data.sources",
        sources.replace("NAME", "d"),
        "--training.steps",
        "2",
    )
    Path("far").mkdir()
    shutil.move("d", "far/d")
    words = ("--data.path", "far/d", "--data.sources", sources.replace("NAME", "far/d"))
    assert train("tiny.yaml", *words, "--training.steps", "3") == 3


def test_a_start_that_takes_no_step_changes_nothing(started):
    words = (
        "tiny.yaml",
        "--data.path",
        "d",
        "--training.steps",
        "2",
        "--logging.tensorboard",
        "true",
    )
    train(*words)
    before = tree(started / "runs")
    train(*words)
    run("train", *words, "--optimizer.schedule", "constant", "--evaluation.num_noise_levels", "3")
    assert tree(started / "runs") == before
    config = with_absolute_paths(
        load_config(Path("tiny.yaml"), ["--optimizer.schedule", "constant", *words[1:]]).config
    )
    assert is_trained(config.run.dir, config)
    assert "is trained: step 2 of 2" in run(
        "launch", "local", *words, "--optimizer.schedule", "constant"
    )
    assert tree(started / "runs") == before
    assert not is_trained(
        config.run.dir, load_run_config(config.run.dir, ["--training.steps", "3"])
    )
    newest = config.run.dir / "checkpoints" / f"step-{latest_checkpoint_step(config.run.dir):08d}"
    (newest / "health.json").write_text('{"healthy": false}')
    assert not is_trained(config.run.dir, config), "it diverged at its end, and has to say so again"


@pytest.mark.parametrize("steps", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stop_before_the_first_step_leaves_no_trace(started, steps):
    words = (
        "tiny.yaml",
        "--data.path",
        "d",
        "--training.steps",
        "4",
        "--logging.tensorboard",
        "true",
    )
    if steps:
        train(*words, until=steps)
    before = tree(started / "runs")
    trainer = Trainer.build(
        load_config(Path(words[0]), ["--optimizer.schedule", "constant", *words[1:]]).config
    ).open()
    wait = trainer._batches.loader.wait

    def interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        wait()

    trainer._batches.loader.wait = interrupted
    trainer.fit()
    trainer.close()
    assert (trainer.step, trainer.stopped_by) == (steps, "SIGTERM")
    assert tree(started / "runs") == before
    assert train(*words) == 4


def test_a_launched_run_that_was_moved_is_not_resumed_in_its_old_place(started, tmp_path):
    folder = started / "runs/x/launch"
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text("{}")
    (folder / "job.sh").write_text("")
    (folder / "config.yaml").write_text(f"run: {{dir: {started}/runs/x}}\n")
    shutil.move("runs/x", "runs/y")
    with pytest.raises(
        UserError,
        match=f"y was launched as {started}/runs/x and has been moved: use `bitlm launch slurm",
    ):
        submit.resume_run(Path("runs/y"))
