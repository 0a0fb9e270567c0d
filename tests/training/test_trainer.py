import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bitlm_dist.checkpoint import store
from bitlm_dist.config_loading import read_run
from bitlm_dist.errors import UserError
from bitlm_dist.training.trainer import Trainer
from bitlm_dist.training.weights import load_trained, model_tensors

HARD = (
    "--diffusion.draws", "2", "--diffusion.context_dropout", "0.2", "--diffusion.input_bit_flips", "0.05",
    "--training.steps", "40", "--parallel.microbatch", "2",
)  # fmt: skip


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_equals_uninterrupted_bitwise(precision, tiny, tmp_path):
    """Mid-epoch and across an epoch's end, with several draws, dropped contexts, flipped bits and microbatches."""
    words = (*HARD, "--training.precision", precision)
    whole = Trainer(tiny(*words, "--run.dir", str(tmp_path / "whole")))
    whole.fit(until=14)
    per_epoch = len(whole.feed) / whole.sequences
    assert per_epoch > 6, "the run is stopped inside an epoch"
    first = Trainer(tiny(*words))
    first.fit(until=5)
    first.close()
    second = Trainer(tiny(*words))
    assert second.step == 5
    second.fit(until=14)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name, tensor in model_tensors(whole.engine.chunks).items():
        assert torch.equal(tensor, model_tensors(second.engine.chunks)[name]), name
    whole.close()
    second.close()


def test_training_learns_and_leaves_a_whole_run_folder(tiny, tmp_path):
    trainer = Trainer(tiny("--training.steps", "30", "--logging.tensorboard", "true", "--checkpoint.every_steps", "10"))
    seen = []
    trainer.fit(observe=seen.append)
    trainer.close()
    run = tmp_path / "run"
    assert sum(m["loss"] for m in seen[-5:]) < 0.9 * sum(m["loss"] for m in seen[:5])
    assert {"step", "loss", "grad_norm", "tokens", "tokens_per_second"} <= set(seen[0])
    assert [m["tokens"] for m in seen] == [256 * (i + 1) for i in range(30)]
    assert store.complete_steps(run / "checkpoints") == [20, 30]  # the newest two
    assert (run / "checkpoints/step-00000030/manifest.json").is_file()
    assert list((run / "tensorboard").glob("events*"))
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    assert read_run(run) == trainer.config
    folder, model, step = load_trained(run, trainer.config)
    assert step == 30
    assert folder.tokenizer().vocabulary == 300
    for name, tensor in model_tensors([model]).items():
        assert torch.equal(tensor, model_tensors(trainer.engine.chunks)[name])
    again = Trainer(tiny("--training.steps", "30", "--logging.tensorboard", "true", "--checkpoint.every_steps", "10"))
    assert again.step == 30
    again.close()


def test_metrics_after_the_last_checkpoint_are_forgotten(tiny, tmp_path):
    trainer = Trainer(tiny())
    trainer.fit(until=2)
    trainer.close()
    metrics = tmp_path / "run" / "metrics.jsonl"
    kept = metrics.read_text()
    metrics.write_text(kept + '{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    Trainer(tiny()).close()
    assert metrics.read_text() == kept


def test_a_folder_in_use_is_refused_with_its_holder_until_that_is_gone(tiny, tmp_path):
    first = Trainer(tiny())
    with pytest.raises(UserError, match=rf"run.dir = .* is in use by process {os.getpid()} on .*, since .*: wait for it, end it"):
        Trainer(tiny())
    first.close()
    hold = "import sys, time; from pathlib import Path; from bitlm_dist.training.run_folder import RunFolder\n"
    hold += "folder = RunFolder(Path(sys.argv[1])); folder._hold(); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is in use by process {holder.pid} on "):
        Trainer(tiny())
    holder.kill()
    holder.wait()
    Trainer(tiny()).close()


def test_two_failed_saves_are_said_and_the_third_in_a_row_ends_training(tiny, tmp_path, monkeypatch, capsys):
    trainer, plain, asked = Trainer(tiny("--checkpoint.every_steps", "1", "--training.steps", "9")), store.save, []

    def save(root, step, *arguments):
        asked.append(step)
        if step in (1, 2, 4, 5, 6):
            raise store.SaveError(f"step {step}: the disk is full")
        return plain(root, step, *arguments)

    monkeypatch.setattr(store, "save", save)
    with pytest.raises(UserError, match="step 6: the disk is full"):
        trainer.fit()
    trainer.close()
    assert asked == [1, 2, 3, 4, 5, 6]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [3]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bitlm:")]
    assert len(said) == 4
    assert said[0].endswith("step 1: the disk is full; training goes on (1 of 3 failed saves in a row end it)")


REFUSED = [
    (("--model.backbone.layers", "3"), "a run with model.backbone.layers = 2, now 3"),
    (("--training.seed", "1"), "a run with training.seed = 0, now 1"),
    (("--training.steps", "7"), r"training.steps = 6, now 7 \(the schedule depends on it\)"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_run_folder_of_another_config_is_refused_and_kept(tiny, tmp_path, change, message):
    trainer = Trainer(tiny())
    trainer.fit(until=1)
    trainer.close()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=message):
        Trainer(tiny(*change))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_other_folders_and_no_resume_are_refused(tiny, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files but no run"):
        Trainer(tiny())
    assert [p.name for p in run.iterdir()] == ["notes.txt"]
    (run / "notes.txt").unlink()
    trainer = Trainer(tiny())
    trainer.fit(until=1)
    trainer.close()
    with pytest.raises(UserError, match="holds checkpoints up to step 1: drop --no-resume"):
        Trainer(tiny(), resume=False)


def test_data_of_another_tokenizer_is_refused_and_the_folder_kept(tiny, tmp_path, corpus):
    from bitlm_dist.data_prep.prepare import prepare

    trainer = Trainer(tiny())
    trainer.fit(until=1)
    trainer.close()
    other = tmp_path / "other"
    prepare([corpus], "bpe:310", other, validation=0.1)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="was trained with another tokenizer than data.path has"):
        Trainer(tiny("--data.path", str(other)))
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_shards_that_changed_under_a_run_are_refused(tiny, tmp_path, prepared):
    """Same tokenizer, other documents: the sequence numbers would mean other text."""
    import shutil

    trainer = Trainer(tiny())
    trainer.fit(until=1)
    trainer.close()
    other = shutil.copytree(prepared, tmp_path / "other")
    index = other / "train" / "index.json"
    document = json.loads(index.read_text())
    document["shards"].reverse()
    index.write_text(json.dumps(document) + " ")
    with pytest.raises(UserError, match="was trained with another data.index"):
        Trainer(tiny("--data.path", str(other)))


def test_a_back_end_that_is_not_there_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="model.backbone.attention = fa9 is not available on this machine: choose from auto, sdpa"):
        Trainer(tiny("--model.backbone.attention", "fa9"))
    assert not (tmp_path / "run").exists()


def test_too_few_bits_for_the_tokenizer(tiny, tmp_path):
    with pytest.raises(UserError, match="model.bits = 8 gives 256 codes, too few for the tokenizer's 300 tokens: use 9"):
        Trainer(tiny("--model.bits", "8"))
    assert not (tmp_path / "run").exists()


def test_a_constant_schedule_may_be_lengthened(tiny):
    trainer = Trainer(tiny("--optimizer.schedule", "constant"))
    trainer.fit(until=1)
    trainer.close()
    Trainer(tiny("--optimizer.schedule", "constant", "--training.steps", "9")).close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_goes_on_where_it_was_saved(tiny, tmp_path, prepared, number):
    """The real command, killed; SIGTERM saves first, SIGKILL falls back to the last checkpoint. The losses stay the same."""
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
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # what SIGKILL leaves goes with the test's folder
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 7):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    output = process.communicate()[0]
    if number == signal.SIGTERM:
        assert process.returncode == 0
        assert "SIGTERM: saved at step" in output
    saved = store.complete_steps(run / "checkpoints")[-1]
    assert saved >= 5
    resumed = Trainer(tiny(*words))
    assert resumed.step == saved
    resumed.fit(until=saved + 3)
    resumed.close()
    whole = Trainer(tiny(*words, "--run.dir", str(tmp_path / "whole")))
    whole.fit(until=saved + 3)
    whole.close()
    assert losses(run) == losses(tmp_path / "whole")
