"""A whole run, and what a trainer refuses before it trains."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import losses

from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.config_loading import load_run_config
from bitlm_dist.errors import UserError
from bitlm_dist.training.trainer import Trainer
from bitlm_dist.training.weights import load_trained_model, model_state_dict

pytestmark = pytest.mark.integration


def test_training_learns_and_leaves_a_whole_run_folder(tiny, tmp_path):
    words = ("--training.steps", "30", "--logging.tensorboard", "true")
    words += ("--checkpoint.every_steps", "10")
    trainer = Trainer.build(tiny(*words)).open()
    seen = []
    trainer.add_hook(seen.append)
    trainer.fit()
    trainer.close()

    run = tmp_path / "run"
    assert sum(m["loss"] for m in seen[-5:]) < 0.9 * sum(m["loss"] for m in seen[:5])
    assert {"step", "loss", "grad_norm", "tokens", "tokens_per_second"} <= set(seen[0])
    assert [m["tokens"] for m in seen] == [256 * (i + 1) for i in range(30)]
    # Two that the next step has proven healthy, and the last.
    assert complete_steps(run / "checkpoints") == [10, 20, 30]
    assert (run / "checkpoints/step-00000030/manifest.json").is_file()
    assert list((run / "tensorboard").glob("events*"))
    assert (
        json.loads((run / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    )
    assert load_run_config(run) == trainer.config

    folder, model, step = load_trained_model(run, trainer.config)
    assert step == 30
    assert folder.tokenizer().vocab_size == 300
    for name, tensor in model_state_dict([model]).items():
        assert torch.equal(tensor.full, model_state_dict(trainer.engine.chunks)[name].full)

    again = Trainer.build(tiny(*words)).open()
    assert again.step == 30
    again.close()


def test_building_leaves_the_disk_alone(tiny, tmp_path, prepared):
    before = {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}
    trainer = Trainer.build(tiny())
    assert trainer.engine.num_parameters > 0
    trainer.dataset.close()
    assert not (tmp_path / "run").exists()
    assert before == {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}


def test_a_step_is_read_once_the_next_one_was_launched_and_at_once_before_a_save(tiny):
    events = []
    with Trainer.build(tiny("--checkpoint.every_steps", "4")).open() as trainer:
        launch = trainer.engine.train_step
        save = trainer.checkpoints.manager.save

        def train_step(batch, step):
            events.append(f"launch {step + 1}")
            return launch(batch, step)

        def save_checkpoint(step, *rest):
            events.append(f"save {step}")
            save(step, *rest)

        trainer.engine.train_step = train_step
        trainer.checkpoints.manager.save = save_checkpoint
        trainer.add_hook(lambda metrics: events.append(f"read {metrics['step']}"))
        trainer.add_hook(lambda metrics: events.append("third"), every=3)
        trainer.fit()

    begin = ["launch 1", "launch 2", "read 1", "launch 3", "read 2", "launch 4", "read 3", "third"]
    then = ["read 4", "save 4", "launch 5", "launch 6", "read 5", "read 6", "third", "save 6"]
    assert events == begin + then


def test_what_was_done_before_an_error_is_on_record(tiny, tmp_path):
    with Trainer.build(tiny()).open() as trainer:
        launch = trainer.engine.train_step

        def train_step(batch, step):
            if step == 3:
                raise RuntimeError("on fire")
            return launch(batch, step)

        trainer.engine.train_step = train_step
        with pytest.raises(RuntimeError, match="on fire"):
            trainer.fit()
    assert len(losses(tmp_path / "run")) == 3


def test_a_folder_in_use_is_refused_with_its_holder_until_that_is_gone(tiny, tmp_path):
    first = Trainer.build(tiny()).open()
    message = rf"in use by process {os.getpid()} on .*, since .*: wait for it, end it"
    with pytest.raises(UserError, match=f"run.dir = .* is {message}"):
        Trainer.build(tiny()).open()
    first.close()

    # A lock counts only between processes, so another one must hold it.
    hold = "import sys, time; from pathlib import Path\n"
    hold += "from bitlm_dist.training.run_folder import RunFolder\n"
    hold += "folder = RunFolder(Path(sys.argv[1])); folder._acquire_lock()\n"
    hold += "print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )

    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is in use by process {holder.pid} on "):
        Trainer.build(tiny()).open()

    holder.kill()
    holder.wait()
    Trainer.build(tiny()).open().close()


REFUSED = [
    (("--model.backbone.num_layers", "3"), "a run with model.backbone.num_layers = 2, now 3"),
    (("--training.seed", "1"), "a run with training.seed = 0, now 1"),
    (("--training.steps", "7"), r"training.steps = 6, now 7 \(the schedule depends on it\)"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_run_folder_of_another_config_is_refused_and_kept(tiny, tmp_path, change, message):
    trainer = Trainer.build(tiny()).open()
    trainer.fit(until=1)
    trainer.close()

    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=message):
        Trainer.build(tiny(*change)).open()
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_other_folders_and_no_resume_are_refused(tiny, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files but no run"):
        Trainer.build(tiny()).open()

    assert [p.name for p in run.iterdir()] == ["notes.txt"]

    (run / "notes.txt").unlink()
    trainer = Trainer.build(tiny()).open()
    trainer.fit(until=1)
    trainer.close()

    with pytest.raises(UserError, match="holds checkpoints up to step 1: drop --no-resume"):
        Trainer.build(tiny()).open(resume=False)


def test_data_of_another_tokenizer_is_refused_and_the_folder_kept(tiny, tmp_path, corpus):
    from bitlm_dist.data_prep.prepare import prepare

    trainer = Trainer.build(tiny()).open()
    trainer.fit(until=1)
    trainer.close()

    other = tmp_path / "other"
    prepare([corpus], "bpe:310", other, validation_fraction=0.1)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="was trained with another tokenizer than data.path has"):
        Trainer.build(tiny("--data.path", str(other))).open()

    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_back_end_that_is_not_there_is_refused(tiny, tmp_path):
    with pytest.raises(
        UserError,
        match="model.backbone.attention = fa9: .* does not exist: choose from .*auto, .*merge",
    ):
        Trainer.build(tiny("--model.backbone.attention", "fa9")).open()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "statistics.npz"])
def test_data_whose_small_files_changed_are_refused(name, tiny, tmp_path, prepared):
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    with pytest.raises(UserError, match=f"{copy / name} is damaged, or not the one that"):
        Trainer.build(tiny("--data.path", str(copy))).open()
    assert not (tmp_path / "run").exists()


def test_too_few_bits_for_the_tokenizer(tiny, tmp_path):
    with pytest.raises(
        UserError,
        match="model.bits = 8 gives 256 codes, too few for the tokenizer's 300 tokens: use 9",
    ):
        Trainer.build(tiny("--model.bits", "8")).open()
    assert not (tmp_path / "run").exists()
