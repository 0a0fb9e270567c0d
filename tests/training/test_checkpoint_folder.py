import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitlm_dist.cli import app
from bitlm_dist.errors import UserError
from bitlm_dist.launch import attempts
from bitlm_dist.training.checkpoint_folder import CheckpointFolder, checkpoint_steps, run_folder_of
from bitlm_dist.training.run_folder import RunFolder
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.integration


def run(*words):
    result = CliRunner(env={"COLUMNS": "240"}).invoke(app, [str(word) for word in words])
    if result.exception:
        raise result.exception
    return result.output


def train(config, until=None):
    trainer = Trainer.build(config).open()
    trainer.fit(until)
    trainer.close()
    return trainer.step


@pytest.mark.slow
def test_every_reader_follows_checkpoints_on_another_disk(tiny, tmp_path):
    folder = tmp_path / "run"
    disk = tmp_path / "disk" / "x"
    words = (
        "--checkpoint.dir",
        str(disk),
        "--training.steps",
        "4",
        "--checkpoint.every_steps",
        "1",
        "--checkpoint.keep",
        "1",
    )

    assert train(tiny(*words), until=3) == 3
    assert sorted(path.name for path in disk.glob("step-*")) == [
        "step-00000002",
        "step-00000003",
    ], "older ones were removed there"
    assert (folder / "checkpoints").is_symlink()
    assert train(tiny(*words)) == 4
    assert attempts.latest_checkpoint_step(folder) == 4
    assert [row["step"] for row in json.loads(run("checkpoint", "list", folder, "--json"))][-1] == 4
    assert "whole" in run("checkpoint", "verify", folder)
    assert json.loads(run("generate", folder, "--blocks", "1", "--json"))["token_ids"]

    for number, place in enumerate(
        (folder, folder / "checkpoints" / "step-00000004", disk / "step-00000004")
    ):
        assert "MiB of weights" in run("checkpoint", "export", place, tmp_path / f"out-{number}")

    run("checkpoint", "import", tmp_path / "out-0", tmp_path / "back")
    assert not (tmp_path / "back" / "checkpoints").is_symlink()
    with pytest.raises(
        UserError,
        match=f"checkpoint.dir = {disk} has the checkpoints of the run {folder}: choose another",
    ):
        Trainer.build(tiny(*words, "--run.dir", str(tmp_path / "second"))).open()

    shutil.move(tmp_path / "disk", tmp_path / "away")
    for words in (
        ("eval", folder),
        ("checkpoint", "list", folder),
        ("train", folder / "config.yaml"),
    ):
        with pytest.raises(
            UserError, match=f"checkpoints leads to {disk}, which is not there: mount its disk"
        ):
            run(*words)


def test_a_run_folder_may_be_reached_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run = tmp_path / "link" / "run"
    run.mkdir()
    for wanted in (None, run / "checkpoints", tmp_path / "real" / "run" / "checkpoints"):
        place = CheckpointFolder(run)
        place.acquire(wanted)
        (run / "checkpoints").mkdir(exist_ok=True)
        place.make_link()
        place.release()
        assert not (run / "checkpoints").is_symlink()

    # a folder elsewhere is this run's, by whichever name it comes
    second = tmp_path / "link" / "second"
    second.mkdir()
    for name in ("link", "real"):
        place = CheckpointFolder(tmp_path / name / "second")
        place.acquire(tmp_path / "disk")
        place.make_link()
        place.release()


@pytest.mark.slow
def test_a_link_in_a_fresh_run_folder_is_followed(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    assert train(tiny("--training.steps", "1")) == 1
    assert (tmp_path / "disk" / "step-00000001").is_dir()
    assert train(tiny("--training.steps", "1", "--checkpoint.dir", str(tmp_path / "disk"))) == 1


@pytest.fixture
def begun(tmp_path):
    """Function that makes a run folder of some name in which one step was taken."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").touch()
        (folder / "run.lock").touch()
        return folder

    return make


def claim(folder, wanted=None):
    place = CheckpointFolder(folder)
    place.acquire(wanted)
    place.make_link()
    return place


def test_two_runs_never_share_a_folder(tmp_path, begun):
    first = begun("first")
    second = begun("second")
    disk = tmp_path / "disk"
    held = claim(first, disk)
    (second / "checkpoints").symlink_to(disk)

    for wanted in (disk, None):
        with pytest.raises(UserError, match=f"has the checkpoints of the run {first}"):
            claim(second, wanted)

    (first / "checkpoints").unlink()
    with pytest.raises(UserError, match=f"is in use by the run {first}: wait for it"):
        claim(second)
    held.release()
    claim(second).release()  # the first one has given it up

    own = begun("own")
    (own / "checkpoints").mkdir()
    with pytest.raises(UserError, match=f"has the checkpoints of the run {own}"):
        claim(begun("third"), own / "checkpoints")

    (tmp_path / "old" / "step-00000001").mkdir(parents=True)
    (tmp_path / "old" / "step-00000001" / "manifest.json").touch()
    with pytest.raises(UserError, match="has checkpoints of another run: choose an empty"):
        claim(tmp_path / "fresh", tmp_path / "old")

    assert not (tmp_path / "fresh").exists()


def test_checkpoints_stay_where_the_run_has_them(tmp_path, begun):
    folder = begun("run")
    disk = tmp_path / "disk"
    (folder / "checkpoints").mkdir()
    with pytest.raises(UserError, match="exists: move it to that folder, or leave the key out"):
        claim(folder, disk)
    claim(folder, folder / "checkpoints").release()

    shutil.move(folder / "checkpoints", disk)
    (disk / "step-00000007").mkdir()
    (disk / "step-00000007" / "manifest.json").touch()
    claim(folder, disk).release()
    assert checkpoint_steps(folder) == [7]

    with pytest.raises(
        UserError, match=f"checkpoint.dir = {tmp_path}/other, but .* leads to {disk}"
    ):
        claim(folder, tmp_path / "other")

    moved = shutil.move(folder, tmp_path / "moved")
    claim(Path(moved)).release()
    assert run_folder_of(disk / "step-00000007") == tmp_path / "moved"

    with pytest.raises(UserError, match="is not in a run folder"):
        run_folder_of(tmp_path / "x" / "step-00000001")
    assert RunFolder(Path(moved)).checkpoints == tmp_path / "moved" / "checkpoints"


def test_a_folder_that_is_not_linked_is_left_as_it_was_found(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "disk").mkdir()
    folder = CheckpointFolder(run)
    folder.acquire(tmp_path / "disk" / "new" / "newer")
    assert (tmp_path / "disk" / "new" / "newer" / "run.lock").is_file()

    folder.release()
    assert list((tmp_path / "disk").iterdir()) == list(run.iterdir()) == []
