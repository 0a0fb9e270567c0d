"""A line of metrics.jsonl: what the host knows of a step, and what code has recorded in it."""

import pytest
import torch

from bitlm_dist.recording import record
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.trainer import Trainer


def test_a_record_does_not_replace_a_metric(tiny, monkeypatch):
    step = Engine.train_step

    def recording(engine, *args):
        record("loss", torch.tensor(0.0))
        return step(engine, *args)

    monkeypatch.setattr(Engine, "train_step", recording)
    with (
        Trainer.build(tiny()).open() as trainer,
        pytest.raises(RuntimeError, match=r"record\('loss'\): metrics.jsonl has another value"),
    ):
        trainer.fit()
