"""Requests to stop a run, between steps and inside long waits."""

import json
import os
import signal
import threading
import time

import pytest
from runs import losses

from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.integration


def after(seconds, action):
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def test_a_stop_file_ends_the_run_with_a_checkpoint_and_is_used_up(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("bitlm_dist.training.stop_signals.POLL_SECONDS", (0.01, 0.01))
    (tmp_path / "run").mkdir()
    trainer = Trainer.build(tiny("--training.steps", "500")).open()
    stop = tmp_path / "run" / "stop"
    trainer.add_hook(lambda metrics: stop.touch() if metrics["step"] == 3 else None)
    trainer.fit()

    assert 3 <= trainer.step < 500
    assert trainer.stopped_by == "stop file"
    assert not stop.exists()
    assert complete_steps(tmp_path / "run" / "checkpoints") == [trainer.step]
    trainer.close()

    stop.touch()
    again = Trainer.build(tiny("--training.steps", "500")).open()
    again.fit(until=again.step + 2)
    assert again.stopped_by is None, "a file from before the run means nothing"
    again.close()


def test_a_stop_breaks_into_data_that_does_not_come(tiny, tmp_path):
    trainer = Trainer.build(tiny()).open()
    waiting = threading.Event()
    plain = trainer.dataset.batch

    def batch(first, *rest):
        if first < 24:
            return plain(first, *rest)
        while trainer.step < 3:  # the training thread is about to wait for this
            time.sleep(0.01)
        after(0.3, lambda: os.kill(os.getpid(), signal.SIGUSR2))
        return waiting.wait(60)

    trainer.dataset.batch = batch
    trainer.fit()
    assert trainer.stopped_by == "SIGUSR2"
    assert trainer.step == 3

    waiting.set()
    trainer.close()
    assert complete_steps(tmp_path / "run" / "checkpoints") == [3]


def test_a_stop_breaks_into_an_evaluation_which_the_resumed_run_makes(tiny, tmp_path):
    words = ("--evaluation.every_steps", "3")
    asked = []

    def evaluate(model):
        asked.append(model.training)
        if len(asked) == 1:
            after(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM))
            time.sleep(60)
        return {"score": float(len(asked))}

    trainer = Trainer.build(tiny(*words)).open()
    trainer.fit(evaluate=evaluate)
    assert (trainer.stopped_by, trainer.step) == ("SIGTERM", 3)
    trainer.close()

    second = Trainer.build(tiny(*words)).open()
    assert not second.is_done

    second.fit(evaluate=evaluate)
    assert second.is_done
    second.close()

    lines = [
        json.loads(line)
        for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    ]
    assert [(line["step"], line["validation"]["score"]) for line in lines] == [(3, 2.0), (6, 3.0)]
    assert asked == [False] * 3

    third = Trainer.build(tiny(*words)).open()
    assert third.is_done
    third.close()


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["step", "evaluation"])
def test_all_ranks_stop_after_the_same_step_whichever_was_asked(
    where, tiny, tiny_file, prepared, tmp_path
):
    from ranks import run_ranks

    run = tmp_path / "run"
    words = ["--data.path", str(prepared), "--run.dir", str(run), "--training.steps", "40"]
    words += ["--optimizer.schedule", "constant", "--checkpoint.every_steps", "40"]
    words += ["--evaluation.every_steps", "4" if where == "evaluation" else "0"]
    folder = tmp_path / "job"
    folder.mkdir()
    found = run_ranks(
        2, "stopping", "one_rank_is_asked", str(tiny_file), words, where, folder=folder, timeout=120
    )

    # The request travels with step 4 and is read while step 5 runs. An evaluation ends at once, and
    # is left to the resumed run.
    assert found == [(5, "SIGTERM", 0) if where == "step" else (4, "SIGTERM", 0)] * 2
    step = found[0][0]
    assert complete_steps(run / "checkpoints")[-1] == step
    assert len(losses(run)) == step

    resumed = Trainer.build(tiny(*words)).open()
    assert (resumed.step, resumed.state.tokens) == (step, step * 256)
    resumed.close()
