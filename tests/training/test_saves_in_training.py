"""When a run saves, what it keeps, and saves that fail."""

import json
from contextlib import suppress

import pytest

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.errors import UserError
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.integration


def test_two_failed_saves_are_said_and_the_third_in_a_row_ends_training(
    tiny, tmp_path, monkeypatch, capsys
):
    trainer = Trainer.build(tiny("--checkpoint.every_steps", "1", "--training.steps", "9")).open()
    plain = store.create_partial_folder
    asked = []

    def begin(root, step):
        asked.append(step)
        if step in (1, 2, 4, 5, 6):
            raise OSError(f"step {step}: the disk is full")
        return plain(root, step)

    monkeypatch.setattr(store, "create_partial_folder", begin)
    with pytest.raises(
        UserError, match="step 6: the disk is full; then the same command goes on from step 3$"
    ):
        trainer.fit()
    trainer.close()
    assert asked == [1, 2, 3, 4, 5, 6]
    assert complete_steps(tmp_path / "run" / "checkpoints") == [3]

    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bitlm:")]
    assert len(said) == 4
    assert said[0].endswith(
        "step 1: the disk is full; training goes on; "
        "3 failed saves in a row end the run, this was number 1"
    )


def test_a_last_save_that_fails_is_an_error(tiny, monkeypatch, capsys):
    def begin(root, step):
        raise OSError("the disk is full")

    trainer = Trainer.build(tiny()).open()
    monkeypatch.setattr(store, "create_partial_folder", begin)
    message = "the checkpoint of the last step, 2, could not be written: .*: the disk is full; "
    with pytest.raises(UserError, match=f"^{message}then the same command goes on from the begin"):
        trainer.fit(until=2)
    trainer.close()
    assert capsys.readouterr().err == "", "training does not go on, and the error says all"


def test_stall_and_total_of_every_save_are_on_record(tiny, tmp_path):
    trainer = Trainer.build(tiny("--checkpoint.every_steps", "2")).open()
    trainer.fit()
    trainer.close()

    saves = [
        json.loads(line) for line in (tmp_path / "run" / "saves.jsonl").read_text().splitlines()
    ]
    assert [save["step"] for save in saves] == [2, 4, 6]

    for save in saves:
        assert 0 < save["stall_seconds"] <= save["total_seconds"]
        assert (
            save["bytes"]
            >= trainer.checkpoints.manager.saver.host_buffer_bytes
            > 4 * trainer.engine.num_parameters
        )


def test_every_nth_is_kept(tiny, tmp_path):
    words = (
        "--checkpoint.every_steps",
        "1",
        "--checkpoint.keep",
        "1",
        "--checkpoint.keep_every_steps",
        "3",
    )
    trainer = Trainer.build(
        tiny("--training.steps", "8", *words, "--checkpoint.asynchronous", "false")
    ).open()
    trainer.fit()
    trainer.close()

    assert complete_steps(tmp_path / "run" / "checkpoints") == [3, 6, 7, 8]


def test_saves_by_time(tiny, tmp_path, monkeypatch):
    config = tiny(
        "--checkpoint.every_steps", "0", "--checkpoint.every_minutes", "1", "--checkpoint.keep", "9"
    )
    trainer = Trainer.build(config).open()
    now = [0.0]
    monkeypatch.setattr("bitlm_dist.training.checkpointing.time.monotonic", lambda: now[0])
    trainer.checkpoints.manager._last_save_time = 0.0

    def pass_time(metrics):
        now[0] += 25

    trainer.add_hook(pass_time)

    trainer.fit()
    trainer.close()
    assert complete_steps(tmp_path / "run" / "checkpoints") == [4, 6], (
        "the clock is asked before a step"
    )


def test_metrics_that_a_full_disk_does_not_take_come_later(tiny, small_disk):
    """A real full disk under a whole run: training goes on, and no line is lost in the end."""
    words = (
        "--run.dir",
        str(small_disk / "run"),
        "--training.steps",
        "8",
        "--checkpoint.every_steps",
        "4",
    )
    trainer = Trainer.build(tiny(*words)).open()
    filler = small_disk / "filler"

    def observe(metrics):
        if metrics["step"] == 1:
            with suppress(OSError), filler.open("wb") as stream:
                while True:
                    stream.write(b"x" * 4096)
        if metrics["step"] == 6:
            filler.unlink()

    trainer.add_hook(observe)

    trainer.fit()
    trainer.close()

    steps = [
        json.loads(line)["step"]
        for line in (small_disk / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 9))
    assert complete_steps(small_disk / "run" / "checkpoints") == [8], "the save of step 4 failed"
