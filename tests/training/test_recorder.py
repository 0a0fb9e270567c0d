"""Values that code records in a step, in one process; test_periodic_evaluation.py has two ranks."""

import pytest
import torch

from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.recording import record, take_records
from bitlm_dist.training.recorder import Recorder


@pytest.fixture
def recorder():
    take_records()
    return Recorder(ParallelLayout())


def result(recorder):
    return recorder.result(recorder.start().flatten().tolist())


def test_calls_of_a_step_become_one_value_and_the_next_step_begins_anew(recorder):
    for number in (1.0, 5.0, 3.0):
        for reduce in ("mean", "sum", "max"):
            record(f"x/{reduce}", torch.tensor(number, requires_grad=True), reduce)
    assert result(recorder) == {"x/mean": 3.0, "x/sum": 9.0, "x/max": 5.0}

    record("x/max", torch.tensor(-2.0), "max")
    assert result(recorder) == {"x/max": -2.0}
    assert result(recorder) == {}


def test_a_value_that_is_not_finite_is_not_taken_for_one_that_is_missing(recorder):
    record("x", torch.tensor(torch.nan))
    assert str(result(recorder)) == "{'x': nan}"


def test_a_name_that_comes_late_is_an_error(recorder):
    assert recorder.start().numel() == 0
    record("late", torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"record\('late'\) must be called in the first step"):
        recorder.start()


def test_a_name_with_two_reductions_is_an_error(recorder):
    record("x", torch.tensor(1.0), "max")
    record("x", torch.tensor(1.0), "mean")
    with pytest.raises(RuntimeError, match=r"record\('x'\) has two reductions: max and mean"):
        recorder.start()
