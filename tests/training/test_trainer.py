import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitlm_dist.checkpoint import store
from bitlm_dist.config_loading import read_run
from bitlm_dist.data.feed import Feed
from bitlm_dist.errors import UserError
from bitlm_dist.training.trainer import Trainer
from bitlm_dist.training.weights import load_trained, model_tensors

pytestmark = pytest.mark.integration

HARD = (
    "--diffusion.draws", "2", "--diffusion.context_dropout", "0.2", "--diffusion.input_bit_flips", "0.05",
    "--training.steps", "40", "--parallel.microbatch", "2",
)  # fmt: skip


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_equals_uninterrupted_bitwise(precision, tiny, tmp_path):
    """Mid-epoch, mid-shard and across an epoch's end: blocks of four, draws, dropped contexts, flipped bits, microbatches."""
    words = (*HARD, "--training.precision", precision)
    whole = Trainer(tiny(*words, "--run.dir", str(tmp_path / "whole")))
    whole.fit(until=14)
    per_epoch = len(whole.feed) / whole.sequences
    assert per_epoch > 6, "the run is stopped inside an epoch"
    index = json.loads((whole.config.data.path / "train" / "index.json").read_text())
    assert len(index["shards"]) == 1, "and inside a shard"
    first = Trainer(tiny(*words))
    first.fit(until=5)
    first.close()
    second = Trainer(tiny(*words))
    assert second.step == 5
    second.fit(until=14)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name, tensor in model_tensors(whole.engine.chunks).items():
        assert torch.equal(tensor.tensor, model_tensors(second.engine.chunks)[name].tensor), name
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
    assert store.complete_steps(run / "checkpoints") == [10, 20, 30]  # two that a step has proven, and the last
    assert (run / "checkpoints/step-00000030/manifest.json").is_file()
    assert list((run / "tensorboard").glob("events*"))
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    assert read_run(run) == trainer.config
    folder, model, step = load_trained(run, trainer.config)
    assert step == 30
    assert folder.tokenizer().vocabulary == 300
    for name, tensor in model_tensors([model]).items():
        assert torch.equal(tensor.tensor, model_tensors(trainer.engine.chunks)[name].tensor)
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
    again = Trainer(tiny())
    again.fit(until=3)
    again.close()
    assert metrics.read_text().startswith(kept)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3]


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
    trainer, plain, asked = Trainer(tiny("--checkpoint.every_steps", "1", "--training.steps", "9")), store.begin, []

    def begin(root, step):
        asked.append(step)
        if step in (1, 2, 4, 5, 6):
            raise OSError(f"step {step}: the disk is full")
        return plain(root, step)

    monkeypatch.setattr(store, "begin", begin)
    with pytest.raises(UserError, match="step 6: the disk is full"):
        trainer.fit()
    trainer.close()
    assert asked == [1, 2, 3, 4, 5, 6]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [3]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bitlm:")]
    assert len(said) == 4
    assert said[0].endswith("step 1: the disk is full; training goes on (1 of 3 failed saves in a row end it)")


def test_a_last_save_that_fails_is_an_error(tiny, monkeypatch):
    def begin(root, step):
        raise OSError("the disk is full")

    trainer = Trainer(tiny())
    monkeypatch.setattr(store, "begin", begin)
    with pytest.raises(UserError, match="the checkpoint of the last step, 2, could not be written"):
        trainer.fit(until=2)
    trainer.close()


def test_stall_and_total_of_every_save_are_on_record(tiny, tmp_path):
    trainer = Trainer(tiny("--checkpoint.every_steps", "2"))
    trainer.fit()
    trainer.close()
    saves = [json.loads(line) for line in (tmp_path / "run" / "saves.jsonl").read_text().splitlines()]
    assert [save["step"] for save in saves] == [2, 4, 6]
    for save in saves:
        assert 0 < save["stall_seconds"] <= save["total_seconds"]
        assert save["bytes"] >= trainer.checkpoints.saver.bytes > 4 * trainer.engine.parameters


def poison(trainer, *bad):
    """Let the gradient norm of some steps be no number, as the engine reports it."""
    plain = trainer.engine.step

    def step(batch, number):
        update = plain(batch, number)
        return replace(update, norm=float("nan"), made=False) if number + 1 in bad else update

    trainer.engine.step = step


def test_a_checkpoint_is_healthy_if_its_step_and_the_next_were(tiny, tmp_path):
    words = ("--training.steps", "12", "--checkpoint.every_steps", "2", "--checkpoint.keep", "1")
    trainer = Trainer(tiny(*words))
    poison(trainer, 5, 6, 8)
    root = tmp_path / "run" / "checkpoints"
    seen = {}

    def look(metrics):
        seen[metrics["step"]] = {s: store.read_health(store.folder_of(root, s)) for s in store.complete_steps(root)}

    trainer.fit(until=9, observe=look)
    assert seen[3] in ({2: True}, {}), "proven by step 3, if it was written by then"
    assert store.complete_steps(root) == [2, 8, 9], "4, 6 and 8 were bad: 2 is the newest healthy one, 8 tells what happened"
    assert store.read_health(store.folder_of(root, 8)) is False
    assert store.read_health(store.folder_of(root, 9)) is None
    trainer.close()
    again = Trainer(tiny(*words))
    assert again.step == 9
    again.fit()
    again.close()
    assert store.complete_steps(root) == [10, 12], "9 was proven by step 10 of the resumed run, 10 by 11"


def test_every_nth_is_kept(tiny, tmp_path):
    words = ("--checkpoint.every_steps", "1", "--checkpoint.keep", "1", "--checkpoint.keep_every_steps", "3")
    trainer = Trainer(tiny("--training.steps", "8", *words, "--checkpoint.asynchronous", "false"))
    trainer.fit()
    trainer.close()
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [3, 6, 7, 8]


def test_saves_by_time(tiny, tmp_path, monkeypatch):
    config = tiny("--checkpoint.every_steps", "0", "--checkpoint.every_minutes", "1", "--checkpoint.keep", "9")
    trainer, now = Trainer(config), [0.0]
    monkeypatch.setattr("bitlm_dist.training.checkpointing.time.monotonic", lambda: now[0])
    trainer.checkpoints._last_time = 0.0

    def pass_time(metrics):
        now[0] += 25

    trainer.fit(observe=pass_time)
    trainer.close()
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [4, 6], "the clock is asked before a step"


def harm(folder):
    file = folder / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def test_a_damaged_checkpoint_is_refused_or_loudly_left_for_the_one_before(tiny, tmp_path, capsys):
    words = ("--checkpoint.every_steps", "2")
    trainer = Trainer(tiny(*words))
    trainer.fit(until=5)
    trainer.close()
    root = tmp_path / "run" / "checkpoints"
    harm(store.folder_of(root, 5))
    with pytest.raises(UserError, match=r"step-00000005/rank-00000.safetensors is damaged: remove .* or set checkpoint.fallback"):
        Trainer(tiny(*words))
    again = Trainer(tiny(*words, "--checkpoint.fallback", "true"))
    assert again.step == 4
    said = capsys.readouterr().err
    assert "CHECKPOINT DAMAGED" in said
    assert "damaged-step-00000005; going on from an older one" in said
    again.fit()
    again.close()
    whole = Trainer(tiny(*words, "--run.dir", str(tmp_path / "whole")))
    whole.fit()
    whole.close()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for step in store.complete_steps(root):
        harm(store.folder_of(root, step))
    with pytest.raises(UserError, match="none of the checkpoints in .* is whole: restore one"):
        Trainer(tiny(*words, "--checkpoint.fallback", "true"))


def test_every_field_that_decides_what_is_read_is_compared(tiny, monkeypatch):
    trainer, plain = Trainer(tiny()), Feed.fingerprint
    trainer.fit(until=1)
    fields = trainer.feed.fingerprint()
    trainer.close()
    assert {"data.index", "data.tokenizer", "data.shuffle_algorithm", "data.shuffle_block_size", "data.order"} <= fields.keys()
    for field in fields:
        monkeypatch.setattr(Feed, "fingerprint", lambda feed, field=field: {**plain(feed), field: "other"})
        with pytest.raises(UserError, match=rf"was trained with another {field} \(.*, now other\): the data would not continue"):
            Trainer(tiny())


def test_fallback_leaves_no_unhealthy_checkpoint_to_be_found_later(tiny, tmp_path, capsys):
    words = ("--training.steps", "12", "--checkpoint.every_steps", "2", "--checkpoint.keep", "9")
    trainer = Trainer(tiny(*words))
    poison(trainer, 6, 8)
    trainer.fit(until=9)
    trainer.close()
    root = tmp_path / "run" / "checkpoints"
    store.remove(store.folder_of(root, 9)).join()
    again = Trainer(tiny(*words))
    assert again.step == 8
    assert "step-00000008: its loss or gradient norm, or that of the next step, was not finite; going on" in capsys.readouterr().err
    again.close()
    again = Trainer(tiny(*words, "--checkpoint.fallback", "true"))
    assert again.step == 4, "8, 6 and 5's successor were bad"
    assert "CHECKPOINT NOT HEALTHY" in capsys.readouterr().err
    again.close()
    assert store.complete_steps(root) == [2, 4]
    assert (root / "latest").resolve().name == "step-00000004"
    assert {path.name for path in root.glob("un*")} == {"unhealthy-step-00000008"}
    harm(store.folder_of(root, 4))
    store.write_health(store.folder_of(root, 2), False)
    last = Trainer(tiny(*words, "--checkpoint.fallback", "true"))
    assert last.step == 2, "better an unhealthy one than none"
    last.close()


def test_a_checkpoint_of_another_format_is_no_damage(tiny, tmp_path):
    trainer = Trainer(tiny())
    trainer.fit(until=1)
    trainer.close()
    folder = store.folder_of(tmp_path / "run" / "checkpoints", 1)
    (folder / "manifest.json").write_text(json.dumps({"format": 9, "files": {}}))
    with pytest.raises(UserError, match="has format 9, this version reads format 2"):
        Trainer(tiny("--checkpoint.fallback", "true"))
    assert folder.is_dir()


def test_shards_that_changed_under_a_run_are_refused_and_nothing_else_changes(tiny, tmp_path, prepared, corpus):
    """Same tokenizer, other documents: the sequence numbers would mean other text."""
    from bitlm_dist.data_prep.prepare import prepare

    trainer = Trainer(tiny("--model.codes", "natural"))
    trainer.fit(until=1)
    trainer.close()
    other = tmp_path / "other"
    prepare([corpus], str(prepared / "tokenizer" / "tokenizer.json"), other, validation=0.2)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "run.lock"}
    with pytest.raises(UserError, match="was trained with another data.index"):
        Trainer(tiny("--model.codes", "natural", "--data.path", str(other)))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "run.lock"}


def test_what_a_kill_leaves_of_a_new_folder_is_no_obstacle(tiny, tmp_path):
    run = tmp_path / "run"
    (run / ".vocabulary" / "tokenizer").mkdir(parents=True)
    (run / ".vocabulary" / "tokenizer" / "tokenizer.json").write_text("{")
    (run / ".config.yaml.partial").write_text("pres")
    (run / "run.lock").write_text("process 1\n")
    Trainer(tiny()).close()
    trainer = Trainer(tiny())
    trainer.fit(until=1)
    trainer.close()
    assert not list(run.glob(".*"))


def test_metrics_that_a_full_disk_does_not_take_come_later(tiny, small_disk):
    """A real full disk under a whole run: training goes on, and what could be written once there is room again is there."""
    words = ("--run.dir", str(small_disk / "run"), "--training.steps", "8", "--checkpoint.every_steps", "4")
    trainer, filler = Trainer(tiny(*words)), small_disk / "filler"

    def observe(metrics):
        if metrics["step"] == 1:
            with suppress(OSError), filler.open("wb") as stream:
                while True:
                    stream.write(b"x" * 4096)
        if metrics["step"] == 6:
            filler.unlink()

    trainer.fit(observe=observe)
    trainer.close()
    steps = [json.loads(line)["step"] for line in (small_disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))
    assert store.complete_steps(small_disk / "run" / "checkpoints") == [8], "the save of step 4 failed"


def test_the_global_batch_changes_by_an_explicit_flag_and_no_sequence_is_lost(tiny, tmp_path):
    words = ("--training.steps", "8")
    first = Trainer(tiny(*words))
    first.fit(until=3)
    first.close()
    twice = ("--training.global_batch_tokens", "512")
    with pytest.raises(UserError, match=r"global_batch_tokens = 256, now 512 \(checkpoint.new_global_batch = true allows it\)"):
        Trainer(tiny(*words, *twice))
    second = Trainer(tiny(*words, *twice, "--checkpoint.new_global_batch", "true"))
    read = []
    plain = second.feed.batch
    second.feed.batch = lambda first, count, device: read.append((first, count)) or plain(first, count, device)
    second.fit(until=5)
    second.close()
    assert read[:2] == [(24, 16), (40, 16)]
    third = Trainer(tiny(*words, *twice))
    assert (third.step, third._sequence) == (5, 56)
    third.close()


def after(seconds, action):
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def test_a_stop_file_ends_the_run_with_a_checkpoint_and_is_used_up(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("bitlm_dist.training.stopping.POLL", (0.01, 0.01))
    (tmp_path / "run").mkdir()
    trainer = Trainer(tiny("--training.steps", "500"))
    stop = tmp_path / "run" / "stop"
    trainer.fit(observe=lambda metrics: stop.touch() if metrics["step"] == 3 else None)
    assert 3 <= trainer.step < 500
    assert trainer.stopped_by == "stop file"
    assert not stop.exists()
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [trainer.step]
    trainer.close()
    stop.touch()
    again = Trainer(tiny("--training.steps", "500"))
    again.fit(until=again.step + 2)
    assert again.stopped_by is None, "a file from before the run means nothing"
    again.close()


def test_a_stop_breaks_into_data_that_does_not_come(tiny, tmp_path):
    trainer, waiting = Trainer(tiny()), threading.Event()
    plain = trainer.feed.batch

    def batch(first, *rest):
        if first < 24:
            return plain(first, *rest)
        while trainer.step < 3:  # the training thread is about to wait for this
            time.sleep(0.01)
        after(0.3, lambda: os.kill(os.getpid(), signal.SIGUSR2))
        return waiting.wait(60)

    trainer.feed.batch = batch
    trainer.fit()
    assert trainer.stopped_by == "SIGUSR2"
    assert trainer.step == 3
    waiting.set()
    trainer.close()
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [3]


def test_a_stop_breaks_into_an_evaluation_which_the_resumed_run_makes(tiny, tmp_path):
    words, asked = ("--evaluation.every_steps", "3"), []

    def evaluate(model):
        asked.append(model.training)
        if len(asked) == 1:
            after(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM))
            time.sleep(60)
        return {"score": float(len(asked))}

    trainer = Trainer(tiny(*words))
    trainer.fit(evaluate=evaluate)
    assert (trainer.stopped_by, trainer.step) == ("SIGTERM", 3)
    trainer.close()
    second = Trainer(tiny(*words))
    assert not second.done
    second.fit(evaluate=evaluate)
    assert second.done
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["validation"]["score"]) for line in lines] == [(3, 2.0), (6, 3.0)]
    assert asked == [False] * 3
    third = Trainer(tiny(*words))
    assert third.done
    third.close()


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


def test_a_back_end_that_is_not_there_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="model.backbone.attention = fa9: .* does not exist: choose from .*'auto', .*'merge'"):
        Trainer(tiny("--model.backbone.attention", "fa9"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "statistics.npz"])
def test_data_whose_small_files_changed_are_refused(name, tiny, tmp_path, prepared):
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    with pytest.raises(UserError, match=f"{copy / name} is damaged, or not the one that"):
        Trainer(tiny("--data.path", str(copy)))
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


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
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
    checkpoint = run / "checkpoints" / "step-00000005"
    while not (checkpoint.is_dir() and metrics.read_text().count("\n") >= 7):
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
