"""Resuming: the same steps on the same data, or a refusal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import losses

from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.errors import UserError
from bitlm_dist.training.trainer import Trainer
from bitlm_dist.training.weights import load_trained_model, model_state_dict

pytestmark = pytest.mark.integration

HARD = (
    "--diffusion.num_noise_samples", "2", "--diffusion.context_dropout", "0.2",
    "--diffusion.input_bit_flips", "0.05", "--training.steps", "40",
    "--parallel.micro_batch_size", "2",
)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_equals_uninterrupted_bitwise(precision, tiny, tmp_path):
    """Mid-epoch, mid-shard and across an epoch's end.

    With blocks of four, several noise samples, context dropout, flipped bits and microbatches.
    """
    words = (*HARD, "--training.precision", precision)
    whole = Trainer.build(tiny(*words, "--run.dir", str(tmp_path / "whole"))).open()
    whole.fit(until=14)
    per_epoch = len(whole.dataset) / whole.sequences_per_step
    assert per_epoch > 6, "the run is stopped inside an epoch"

    index = json.loads((whole.config.data.path / "train" / "index.json").read_text())
    assert len(index["shards"]) == 1, "and inside a shard"

    first = Trainer.build(tiny(*words)).open()
    first.fit(until=5)
    first.close()

    second = Trainer.build(tiny(*words)).open()
    assert second.step == 5

    second.fit(until=14)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name, tensor in model_state_dict(whole.engine.chunks).items():
        assert torch.equal(tensor.full, model_state_dict(second.engine.chunks)[name].full), name
    whole.close()
    second.close()


def test_what_is_loaded_from_a_checkpoint_is_not_drawn_before(tiny, tmp_path, monkeypatch):
    trainer = Trainer.build(tiny()).open()
    trainer.fit(until=2)
    trainer.close()
    trained = {n: t.full for n, t in model_state_dict(trainer.engine.chunks).items()}

    def refuse(key, counter):
        raise AssertionError("drawn")

    monkeypatch.setattr("bitlm_dist.model.counter_random.random_words", refuse)
    with pytest.raises(AssertionError, match="drawn"):
        Trainer.build(tiny("--run.dir", str(tmp_path / "new")))

    again = Trainer.build(tiny()).open()
    _, model, step = load_trained_model(tmp_path / "run", again.config)
    assert again.step == step == 2
    for chunk in (again.engine.model, model):
        assert all(torch.equal(t.full, trained[n]) for n, t in model_state_dict([chunk]).items())
    again.close()

    unset = Trainer.build(tiny())
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000002")
    with pytest.raises(UserError, match="checkpoints: the checkpoints were removed while the run"):
        unset.open()


def test_metrics_after_the_last_checkpoint_are_forgotten(tiny, tmp_path):
    trainer = Trainer.build(tiny()).open()
    trainer.fit(until=2)
    trainer.close()

    metrics = tmp_path / "run" / "metrics.jsonl"
    kept = metrics.read_text()
    # Two steps of a process that was killed while it wrote the second one.
    metrics.write_text(kept + '{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    again = Trainer.build(tiny()).open()
    again.fit(until=3)
    again.close()

    assert metrics.read_text().startswith(kept)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]


def test_every_field_that_decides_what_is_read_is_compared(tiny, monkeypatch):
    trainer = Trainer.build(tiny()).open()
    plain = PackedDataset.fingerprint
    trainer.fit(until=1)
    fields = trainer.dataset.fingerprint()
    trainer.close()

    assert {
        "data.index",
        "data.tokenizer",
        "data.shuffle_algorithm",
        "data.shuffle_block_size",
        "data.order",
    } <= fields.keys()

    for field in fields:
        monkeypatch.setattr(
            PackedDataset, "fingerprint", lambda feed, field=field: {**plain(feed), field: "other"}
        )
        message = rf"another {field} \(.*, now other\): the data would not continue"
        with pytest.raises(UserError, match=f"was trained with {message}"):
            Trainer.build(tiny()).open()


def test_shards_that_changed_under_a_run_are_refused_and_nothing_else_changes(
    tiny, tmp_path, prepared, corpus
):
    """Same tokenizer, other documents: the sequences' indices would mean other text."""
    from bitlm_dist.data_prep.prepare import prepare

    trainer = Trainer.build(tiny("--model.codes", "natural")).open()
    trainer.fit(until=1)
    trainer.close()

    other = tmp_path / "other"
    prepare(
        [corpus], str(prepared / "tokenizer" / "tokenizer.json"), other, validation_fraction=0.2
    )
    before = {
        p: p.read_bytes()
        for p in (tmp_path / "run").rglob("*")
        if p.is_file() and p.name != "run.lock"
    }

    with pytest.raises(UserError, match="was trained with another data.index"):
        Trainer.build(tiny("--model.codes", "natural", "--data.path", str(other))).open()
    assert before == {
        p: p.read_bytes()
        for p in (tmp_path / "run").rglob("*")
        if p.is_file() and p.name != "run.lock"
    }


def test_what_a_kill_leaves_of_a_new_folder_is_no_obstacle(tiny, tmp_path):
    run = tmp_path / "run"
    (run / ".vocabulary" / "tokenizer").mkdir(parents=True)
    (run / ".vocabulary" / "tokenizer" / "tokenizer.json").write_text("{")
    (run / ".config.yaml.partial").write_text("pres")
    (run / "run.lock").write_text("process 1\n")
    Trainer.build(tiny()).open().close()

    trainer = Trainer.build(tiny()).open()
    trainer.fit(until=1)
    trainer.close()
    assert not list(run.glob(".*"))


def test_the_global_batch_changes_by_an_explicit_flag_and_no_sequence_is_lost(tiny, tmp_path):
    words = ("--training.steps", "8")
    first = Trainer.build(tiny(*words)).open()
    first.fit(until=3)
    first.close()

    twice = ("--training.global_batch_tokens", "512")
    message = r"256, now 512 \(checkpoint.new_global_batch = true allows it\)"
    with pytest.raises(UserError, match=f"global_batch_tokens = {message}"):
        Trainer.build(tiny(*words, *twice)).open()

    second = Trainer.build(tiny(*words, *twice, "--checkpoint.new_global_batch", "true")).open()
    read = []
    plain = second.dataset.batch
    second.dataset.batch = lambda first, count, device: (
        read.append((first, count)) or plain(first, count, device)
    )
    second.fit(until=5)
    second.close()

    assert read[:2] == [(24, 16), (40, 16)]

    third = Trainer.build(tiny(*words, *twice)).open()
    assert (third.step, third.state.next_sequence) == (5, 56)
    third.close()


def test_a_constant_schedule_may_be_lengthened(tiny):
    trainer = Trainer.build(tiny("--optimizer.schedule", "constant")).open()
    trainer.fit(until=1)
    trainer.close()
    Trainer.build(tiny("--optimizer.schedule", "constant", "--training.steps", "9")).open().close()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_killed_process_goes_on_where_it_was_saved(tiny, tmp_path, prepared, number):
    """The real command, killed: SIGTERM saves first, SIGKILL falls back to the last checkpoint.

    In either case the resumed run's losses are those of an uninterrupted run.
    """
    run = tmp_path / "run"
    words = [
        "--run.dir",
        str(run),
        "--data.path",
        str(prepared),
        "--training.steps",
        "60",
        "--checkpoint.every_steps",
        "5",
    ]
    command = [sys.executable, "-m", "bitlm_dist", "train", str(tiny.file), *words]
    # Leftovers of SIGKILL go with the test's folder.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )

    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    checkpoint = run / "checkpoints" / "step-00000005"
    while not (checkpoint.is_dir() and metrics.read_text().count("\n") >= 7):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)

    os.kill(process.pid, number)
    output = process.communicate()[0]
    if number == signal.SIGTERM:
        assert process.returncode == 75
        assert "SIGTERM: saved at step" in output

    saved = complete_steps(run / "checkpoints")[-1]
    assert saved >= 5

    resumed = Trainer.build(tiny(*words)).open()
    assert resumed.step == saved

    resumed.fit(until=saved + 3)
    resumed.close()

    whole = Trainer.build(tiny(*words, "--run.dir", str(tmp_path / "whole"))).open()
    whole.fit(until=saved + 3)
    whole.close()
    assert losses(run) == losses(tmp_path / "whole")
