import time

import torch

from bitlm_dist.training.readback import DeviceReadback, Moment


def test_values_of_any_dtype_and_shape_arrive_exactly():
    tensors = {
        "loss": torch.tensor(1 / 3),
        "count": torch.tensor([2**53, 7]),
        "applied": torch.tensor(False),
        "none": torch.empty(0),
        "norm": torch.tensor([[torch.inf]], dtype=torch.bfloat16),
    }
    values, _ = DeviceReadback(tensors).read()
    assert values == {
        "loss": [tensors["loss"].item()],
        "count": [2**53, 7],
        "applied": [0.0],
        "none": [],
        "norm": [float("inf")],
    }


def test_what_is_read_is_what_was_there_when_the_copy_began():
    loss = torch.ones(())
    readback = DeviceReadback({"loss": loss})
    loss += 1
    assert readback.read()[0] == {"loss": [1.0]}


def test_a_cpu_is_done_when_the_copy_begins():
    before = Moment.now()
    readback = DeviceReadback({"loss": torch.ones(())})
    after = Moment.now()
    time.sleep(0.01)
    _, completed = readback.read()
    assert before.seconds <= completed.seconds <= after.seconds
    assert before.time <= completed.time <= after.time
    assert before.cpu_seconds <= completed.cpu_seconds <= after.cpu_seconds
