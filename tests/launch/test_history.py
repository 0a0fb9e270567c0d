import json
import os

import pytest

from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import Outcome
from bitlm_dist.launch.history import history_of


def three_attempts(launched):
    """A killed rank after step 17 of checkpoint 10, a start that fails, and one that runs."""
    launched.start()
    launched.train(0, 17)
    launched.save(10)
    launched.end(Outcome.FAILED, "rank 1 on n1 was killed", seconds=20.0)
    launched.start()
    launched.end(Outcome.REFUSED, "no", seconds=5.0)
    launched.start()
    launched.train(10, 30)
    launched.save(28)


def test_what_every_attempt_has_made_and_lost(launched):
    three_attempts(launched)
    launched.end(Outcome.STOPPED, "SIGINT, saved at step 28", seconds=15.0)
    history = history_of(launched.folder)
    rows = [
        (a.attempt, a.outcome, a.first_step, a.last_step, a.saved_step, a.steps_lost, a.seconds)
        for a in history.attempts
    ]
    assert rows == [
        (1, "failed", 0, 17, 10, 7, 20.0),
        (2, "refused", 10, 10, 10, 0, 5.0),
        (3, "stopped", 10, 30, 28, 2, 15.0),
    ], "the second one took no step: what the file holds is of the first"
    assert (history.seconds, history.steps_lost) == (40.0, 9)
    assert [a.lasting_seconds for a in history.attempts] == [5.0, 0.0, 9.0]
    assert history.goodput == pytest.approx(14 / 40)


def test_an_attempt_that_runs_has_lost_nothing_yet(launched):
    three_attempts(launched)
    last = history_of(launched.folder).attempts[-1]
    assert (last.outcome, last.ended, last.steps_lost) == ("", None, None)
    assert (last.last_step, last.saved_step) == (30, 28)
    assert 0 <= last.seconds < 60


def test_an_attempt_whose_launcher_was_killed_does_not_run_on(launched):
    folder = launched.start()
    began = attempts.read_attempt(folder).began
    log = folder / "logs" / "rank-0.log"
    log.touch()
    file = folder / "attempt.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "began": began - 5000}))
    assert history_of(launched.folder).attempts[0].ended is None, "it has just printed something"
    os.utime(log, (began, began - 4000))
    lost = history_of(launched.folder).attempts[0]
    assert (lost.outcome, lost.ended, lost.seconds) == ("", began - 4000, 1000)


def test_without_metrics_nothing_is_claimed(launched):
    launched.start()
    launched.save(10)
    launched.end(Outcome.DONE, "step 10")
    history = history_of(launched.folder)
    assert history.attempts[0].lasting_seconds is None
    assert history.goodput is None
