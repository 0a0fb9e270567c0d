"""Steps overlap, and each second counts once."""

from types import SimpleNamespace

import pytest
import torch

from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.training import step_pipeline
from bitlm_dist.training.agreement import Agreement, Flags
from bitlm_dist.training.engine import StepResult
from bitlm_dist.training.readback import Moment
from bitlm_dist.training.step_pipeline import StepPipeline, TimedBatch


def moment(seconds):
    return Moment(1000.0 + seconds, seconds, 2 * seconds)


class SlowDevice:
    """An engine whose steps are complete at given times, and the readback of its results."""

    layout = ParallelLayout()

    def __init__(self, completed):
        self.completed = completed

    def train_step(self, batch, step):
        number = torch.tensor(float(step))
        return StepResult(
            loss=number,
            loss_terms=torch.empty(0),
            grad_norm=number / 2,
            lr_multiplier=0.1,
            applied=torch.tensor(True),
            num_tokens_and_bytes=torch.tensor([step, 9]),
        )

    def readback(self, tensors):
        values = {name: tensor.reshape(-1).tolist() for name, tensor in tensors.items()}
        completed = moment(self.completed[int(values["loss"][0])])
        return SimpleNamespace(read=lambda: (values, completed))


@pytest.fixture
def pipeline(monkeypatch):
    device = SlowDevice([10.0, 18.0, 30.0])
    monkeypatch.setattr(step_pipeline, "DeviceReadback", device.readback)
    return StepPipeline(device, Agreement(Flags, ParallelLayout()))


def launch(pipeline, step, began):
    pipeline.launch(TimedBatch(None, moment(began), wait_seconds=0.5), step)


def test_reports_come_in_order_and_their_seconds_do_not_overlap(pipeline):
    launch(pipeline, 0, began=1.0)
    launch(pipeline, 1, began=2.0)  # while step 0 runs
    assert len(pipeline) == 2

    first = pipeline.read()
    assert (first.loss, first.grad_norm, first.values["num_tokens_and_bytes"]) == (0.0, 0.0, [0, 9])
    assert (first.seconds, first.cpu_seconds) == (9.0, 18.0), "from its own start"

    second = pipeline.read()
    assert (second.seconds, second.completed.time) == (8.0, 1018.0), "from the end of the first"
    assert len(pipeline) == 0

    # after an evaluation of 7 seconds
    launch(pipeline, 2, began=25.0)
    third = pipeline.read()
    assert (third.seconds, third.cpu_seconds, third.data_wait_seconds) == (5.0, 10.0, 0.5)


@pytest.mark.parametrize(("loss", "norm"), [(1.0, float("inf")), (float("nan"), 1.0)])
def test_a_step_is_finite_if_loss_and_norm_are(pipeline, loss, norm):
    launch(pipeline, 0, began=0.0)
    report = pipeline.read()
    assert report.is_finite

    report.values["loss"][0] = loss
    report.values["grad_norm"][0] = norm
    assert not report.is_finite
