"""Training where there are GPUs: a small set, for machines that have some. Not run yet."""

import json

import pytest
import torch
from ranks import run_ranks

from bitlm_dist.training.trainer import Trainer
from bitlm_dist.training.weights import model_state_dict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
WIDE = ("--model.backbone.head_dim", "64")  # the kernels of a GPU take no narrower heads than 16
BF16 = ("--training.precision", "bf16")


def losses(folder):
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def trained(config, until=None):
    trainer = Trainer.build(config).open()
    trainer.fit(until=until)
    trainer.close()
    return trainer


@pytest.mark.parametrize(
    "words", [(), BF16, ("--model.output", "softmax"), (*BF16, "--preset", "paper")]
)
def test_three_steps(words, tiny):
    trainer = trained(tiny(*WIDE, *words, "--training.steps", "3"))
    assert trainer.attention_backend == "triton" or trainer.attention_backend == "fa4"
    assert all(loss < 12 for loss in losses(trainer.folder.path))
    assert all(parameter.is_cuda for parameter in trainer.engine.model.parameters())


def test_resume_equals_uninterrupted_bitwise(tiny, tmp_path):
    words = (
        *WIDE,
        *BF16,
        "--training.deterministic",
        "true",
        "--training.steps",
        "10",
        "--parallel.micro_batch_size",
        "2",
    )
    whole = trained(tiny(*words, "--run.dir", str(tmp_path / "whole")))
    trained(tiny(*words), until=5)
    second = trained(tiny(*words))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name, tensor in model_state_dict(whole.engine.chunks).items():
        assert torch.equal(tensor.full, model_state_dict(second.engine.chunks)[name].full), name


@pytest.mark.parametrize("words", [(), BF16])
def test_compiled_regions_train_as_those_that_run_as_written(words, tiny, tmp_path):
    found = []
    for choice in ("never", "always"):
        run = str(tmp_path / choice)
        found.append(
            losses(
                trained(
                    tiny(*WIDE, *words, "--training.compile", choice, "--run.dir", run)
                ).folder.path
            )
        )
    assert found[0] == pytest.approx(found[1], rel=2e-2 if words else 1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "layout",
    [(), ("--parallel.tensor", "2", "--parallel.sequence", "true"), ("--parallel.pipeline", "2")],
)
def test_two_gpus_train_what_one_trains(layout, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (one,) = run_ranks(1, "parity", "train_all", {"case": []}, folder=tmp_path / "one")
    two = run_ranks(2, "parity", "train_all", {"case": list(layout)}, folder=tmp_path / "two")[0]
    for (loss, norm), (expected_loss, expected_norm) in zip(
        two["case"][0], one["case"][0], strict=True
    ):
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
