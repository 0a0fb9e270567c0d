import json

import pytest

from bitlm_dist.files import try_lock
from bitlm_dist.launch.attempts import Outcome
from bitlm_dist.launch.liveness import LAUNCHER_LOCK
from bitlm_dist.launch.status import _rate, status_of


def entry(seconds, tokens, predicted):
    return {"seconds": seconds, "tokens": tokens, "predicted_tokens": predicted}


def test_rates_of_the_last_steps():
    recent = [entry(1.0, 100, 10), entry(2.0, 150, 12), entry(3.0, 300, 20)]
    assert (_rate(recent, "tokens"), _rate(recent, "predicted_tokens")) == (100.0, 5.0)


def test_no_rate_where_there_is_nothing_to_divide():
    assert _rate([], "tokens") is _rate([entry(1.0, 100, 10)], "tokens") is None
    assert _rate([entry(1.0, 100, 10), entry(1.0, 100, 10)], "tokens") is None, "no time has passed"
    assert _rate([entry(1.0, 100, None), entry(2.0, 200, None)], "predicted_tokens") is None
    assert (
        _rate([{"seconds": 1.0, "tokens": 1}, {"seconds": 2.0, "tokens": 2}], "predicted_tokens")
        is None
    ), "an older version"


def test_a_run_that_trains(launched, monkeypatch):
    monkeypatch.setattr("bitlm_dist.launch.status.is_running", lambda run, attempts: True)
    launched.start()
    metrics = {"data_wait_seconds": 0.1, "host_memory_bytes": 2**20, "device_memory_bytes": None}
    launched.train(0, 40, **metrics)
    launched.save(30)
    scores = [(10, 2.5, "train"), (20, 2.25, "train"), (30, 2.375, "train"), (30, 1.0, "eval")]
    with (launched.folder / "evaluations.jsonl").open("w") as stream:
        for step, score, by in scores:
            entry = {"step": step, "by": by, "validation": {"bits_per_byte": score}}
            stream.write(json.dumps(entry) + "\n")
    status = status_of(launched.folder)
    assert (status.state, status.step, status.checkpoint, status.loss) == ("running", 40, 30, 2.0)
    assert (status.validation, status.best_validation, status.best_validation_step) == (
        2.375,
        2.25,
        20,
    ), "an evaluation by hand may be of other text"
    assert status.data_wait == pytest.approx(0.2)
    assert (status.host_memory_bytes, status.device_memory_bytes) == (2**20, None)
    assert status.seconds_left == pytest.approx(60 * 256 / 200)
    assert status.goodput is not None


def test_a_run_that_does_not_train_has_no_time_left(launched):
    assert status_of(launched.folder).state == "not begun"
    folder = launched.start()
    launched.train(0, 40)
    status = status_of(launched.folder)
    assert (status.state, status.seconds_left) == (
        "no sign of life for 0 s: its launcher was ended",
        None,
    )
    launched.end(Outcome.FAILED, "why")
    status = status_of(launched.folder)
    assert (status.state, status.last, status.seconds_left) == ("ended", "failed: why", None)
    assert status.data_wait is None, "an older version"
    with (folder.parents[1] / LAUNCHER_LOCK).open("w") as lock:
        assert try_lock(lock)
        assert status_of(launched.folder).state == "waiting to start the next attempt"
