"""Curves over restarts: metrics.jsonl, TensorBoard and Weights & Biases have each step once."""

import gc
import json
import struct
import sys
import time
import types
from collections import Counter
from contextlib import suppress

import pytest

from bitlm_dist.checkpoint.saver import SaveStats
from bitlm_dist.errors import UserError
from bitlm_dist.training import metrics, wandb_log
from bitlm_dist.training.metrics import MetricsLog
from bitlm_dist.training.run_folder import RunFolder
from bitlm_dist.training.trainer import Trainer

# The first process is killed after step 9. The second resumes from step 4 and ends with step 12.
KILLED = 9
SAVED = 4
END = 12


def write(log, first, last, evaluations=()):
    """Write steps, evaluations, and a save after step ``SAVED``."""
    for step in range(first, last + 1):
        log.write({"step": step, "loss": 1.0 / step, "predicted_tokens": None})
        if step in evaluations:
            log.write_evaluation({"step": step}, {"bits_per_byte": 2.0 / step, "tokens": 7})
        if step == SAVED:
            log.flush()
            log.write_save(SaveStats(step, 0.1, 0.2, 3, 3))


def on_board(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(name)]


def test_tensorboard_shows_each_step_once_after_a_kill(tiny, tmp_path):
    config = tiny("--logging.tensorboard", "true")
    killed = MetricsLog(tmp_path, config, step=0)
    write(killed, 1, KILLED, evaluations=(4, 8))
    killed.flush()  # all that a killed process may leave behind, and nothing closes its file
    RunFolder(tmp_path).drop_metrics_after(SAVED)
    log = MetricsLog(tmp_path, config, step=SAVED)
    write(log, SAVED + 1, END, evaluations=(8, 12))
    log.close()

    assert on_board(tmp_path, "loss") == list(range(1, END + 1))
    assert on_board(tmp_path, "validation/bits_per_byte") == [4, 8, 12]
    assert on_board(tmp_path, "checkpoint/bytes") == [SAVED]
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == list(range(1, END + 1))


@pytest.mark.integration
def test_what_a_checkpoint_covers_is_in_tensorboard_s_file_before_it(tiny, tmp_path):
    """Else a kill would lose steps: the resumed run repeats only those after the checkpoint."""
    trainer = Trainer.build(
        tiny("--logging.tensorboard", "true", "--checkpoint.every_steps", "3")
    ).open()
    seen = {}

    def observe(line):
        if line["step"] == 4:
            seen[4] = on_board(tmp_path / "run", "loss")

    trainer.add_hook(observe)

    trainer.fit()
    trainer.close()
    assert seen[4][:3] == [1, 2, 3]


class FakeRun:
    """A run on W&B's server: rows by step, of which only the last one is open."""

    def __init__(self, rows):
        self.rows = rows
        self.fails = False
        self.step = max(rows, default=-1) + 1

    def log(self, values, step):
        if self.fails:
            raise RuntimeError("the network is\ndown")
        assert step >= self.step, "a row that is closed"
        self.step = step
        row = self.rows.setdefault(step, {})
        assert not row.keys() & values.keys(), "sent twice"
        row |= values

    def finish(self):
        pass


@pytest.fixture
def server(monkeypatch):
    """A fake wandb package: the arguments of its `init` calls, and the rows of every run by id."""
    found = types.SimpleNamespace(calls=[], runs={}, error=None, last=None)

    def init(**settings):
        found.calls.append(settings)
        if found.error is not None:
            raise found.error
        found.last = FakeRun(found.runs.setdefault(settings["id"], {}))
        return found.last

    fake = types.SimpleNamespace(init=init, Html=lambda text: text)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return found


def fill(disk):
    """Fill a disk to its last byte."""
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


def train_on_a_full_disk(config, disk):
    """Write until the disk is full, and then more, until an error ends it."""
    log = MetricsLog(disk, config, step=0)
    write(log, 1, 2)
    fill(disk)
    try:
        for step in range(3, 6):
            log.write({"step": step, **{f"metric {i}": float(i) for i in range(2000)}})
            log.flush()
        raise UserError("the first error")
    finally:
        log.close()


def test_what_a_full_disk_does_not_take_hides_no_error_and_is_one_line_each(
    tiny, small_disk, capfd
):
    """TensorBoard's thread fails by itself, and its writer again at every later call."""
    with pytest.raises(UserError, match="the first error"):
        train_on_a_full_disk(tiny("--logging.tensorboard", "true"), small_disk)

    no_room = "no space left on device: make room on that disk, or choose a folder on another one"
    assert capfd.readouterr().err.splitlines() == [
        f"bitlm: {small_disk}/metrics.jsonl cannot be written now: {no_room}; "
        "its lines are kept in memory",
        f"bitlm: TensorBoard's events cannot be written: {no_room}; "
        "this process writes no more of them",
        f"bitlm: {small_disk}/metrics.jsonl lacks 3 lines: {no_room}",
    ]
    gc.collect()  # closes TensorBoard's file, which the disk waits for


def test_lines_that_found_no_room_are_written_when_the_log_is_closed(tiny, small_disk):
    log = MetricsLog(small_disk, tiny(), step=0)
    write(log, 1, 1)
    fill(small_disk)
    log.write({"step": 2, "loss": "x" * 5000})
    (small_disk / "filler").unlink()
    log.close()
    assert [json.loads(line)["step"] for line in (small_disk / "metrics.jsonl").open()] == [1, 2]


def test_records_of_eval_are_no_evaluations_of_training_and_go_with_their_step(tmp_path):
    """`bitlm eval` appends to the same file; training drops what a killed process left behind."""
    lines = [{"step": 3}, {"step": 4, "by": "train"}, {"step": 5, "by": "eval"}]
    lines += [{"step": 6, "by": "train"}, {"step": 7, "by": "eval"}]
    for name in ("evaluations.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + '[]\n3\n{"st'
        )
    folder = RunFolder(tmp_path)
    assert [folder.last_evaluation(step) for step in (2, 3, 5, 9)] == [0, 3, 4, 6]

    folder.drop_metrics_after(5)
    for name in ("evaluations.jsonl", "samples.jsonl"):
        kept = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert kept == lines[:3]


def test_samples_are_text_for_people(tiny, tmp_path, server):
    words = ("--logging.wandb_project", "p", "--logging.wandb_group", "g")
    log = MetricsLog(tmp_path, tiny(*words, "--logging.tensorboard", "true"), step=0)
    samples = [{"prompt": "In the", "text": " beginning\n<was>"}, {"prompt": "", "text": "x"}]
    log.write({"step": 1})
    log.write_samples({"step": 1, "tokens": 256}, samples)
    log.close()

    (line,) = [json.loads(line) for line in (tmp_path / "samples.jsonl").open()]
    assert line.pop("time") == pytest.approx(time.time(), abs=60)
    assert line == {"step": 1, "tokens": 256, "samples": samples}
    assert [call["group"] for call in server.calls] == ["g"]
    (rows,) = server.runs.values()
    assert rows[1]["samples"] == "<pre>In the beginning\n&lt;was&gt;</pre><pre>x</pre>"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 1
    assert event.tensor_proto.string_val == [b"    In the beginning\n    <was>\n\n---\n\n    x"]


def restart(folder, config):
    """Run three processes: killed after step 9, killed after step 6, and one that ends."""
    log = MetricsLog(folder, config, step=0)
    write(log, 1, KILLED, evaluations=(7,))
    if log._wandb._run is not None:
        log._wandb.close()  # the package sends what it was given, even if its process is killed

    for last in (6, END):
        RunFolder(folder).drop_metrics_after(SAVED)
        log = MetricsLog(folder, config, step=SAVED)
        write(log, SAVED + 1, last, evaluations=(7, 8, 12))
        log.close()


def test_restarts_are_one_wandb_run_with_each_step_once(tiny, tmp_path, server):
    folder = tmp_path / "my-run"
    folder.mkdir()
    config = tiny("--logging.wandb_project", "p", "--logging.wandb_tags", "[a, m=4]")
    restart(folder, config)
    assert {call["id"] for call in server.calls} == {
        json.loads((folder / wandb_log.WANDB).read_text())["id"]
    }
    assert len(server.calls) == 3

    for call in server.calls:
        assert (call["project"], call["name"], call["tags"], call["resume"]) == (
            "p",
            "my-run",
            ["a", "m=4"],
            "allow",
        )
        assert call["config"]["model"]["block_size"] == 4

    (rows,) = server.runs.values()
    assert {step: row["loss"] for step, row in rows.items()} == {
        step: 1.0 / step for step in range(1, END + 1)
    }
    assert {
        step: row["validation/bits_per_byte"]
        for step, row in rows.items()
        if "validation/bits_per_byte" in row
    } == {
        7: 2.0 / 7,
        KILLED + 1: 2.0 / 8,
        12: 2.0 / 12,
    }, (
        "the first process was killed before the evaluation of step 8, whose row is closed: "
        "the next row takes it"
    )
    assert [step for step, row in rows.items() if "checkpoint/bytes" in row] == [SAVED]


def test_wandb_that_does_not_start_is_refused_the_first_time_and_no_obstacle_later(
    tiny, tmp_path, server, capsys
):
    config = tiny("--logging.wandb_project", "p", "--logging.wandb_name", "other name")
    server.error = RuntimeError("api_key not\nconfigured")
    with pytest.raises(
        UserError,
        match=r"logging.wandb_project = p: W&B does not start \(api_key not configured\): ",
    ):
        write(MetricsLog(tmp_path, config, step=0), 1, 1)

    assert not (tmp_path / wandb_log.WANDB).exists()
    assert not (tmp_path / "metrics.jsonl").exists(), "a line would claim the folder"
    server.error = None
    log = MetricsLog(tmp_path, config, step=0)
    assert len(server.calls) == 1, "nothing is begun before there is something to send"

    write(log, 1, 1)
    assert server.calls[-1]["name"] == "other name"

    server.last.fails = True
    write(log, 2, 3)
    log.close()

    server.error = RuntimeError("no network")
    log = MetricsLog(tmp_path, config, step=3)
    write(log, 4, 5)
    log.close()

    said = [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]
    assert said == [
        "bitlm: W&B takes no more metrics (the network is down); training goes on without it",
        "bitlm: W&B does not start (no network); training goes on without it, "
        "and the next start of the run tries again",
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_missing_package_is_said_before_anything_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_log, "find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match=r"logging.wandb_project needs the package wandb: pip install 'bitlm-dist\[wandb\]'",
    ):
        Trainer.build(tiny("--logging.wandb_project", "p")).open()
    assert not (tmp_path / "run").exists()


def test_a_damaged_record_is_named(tiny, tmp_path):
    (tmp_path / "wandb.json").write_text('{"id": "x"')
    with pytest.raises(
        UserError, match=r"wandb.json is damaged: remove it, and the run goes on as a new run"
    ):
        RunFolder(tmp_path).drop_metrics_after(0)


def records(file):
    """Yield the records of an offline run's file: protocol buffers in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    at = 7  # after the header
    part = b""
    while at < len(data):
        if 32768 - at % 32768 < 7:  # too little of the block is left for a record
            at += 32768 - at % 32768
            continue
        if len(data) < at + 7:
            return  # being written
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


@pytest.mark.slow
def test_the_real_package_offline(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the package wandb: pip install 'bitlm-dist[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = tiny("--logging.wandb_project", "p", "--logging.wandb_tags", "[a, b]")
    folder = tmp_path / "my-run"
    folder.mkdir()
    restart(folder, config)
    files = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 3

    end = time.monotonic() + 60
    for file in files:  # the package's own process goes on writing for a moment
        while not any(record.WhichOneof("record_type") == "exit" for record in records(file)):
            assert time.monotonic() < end
            time.sleep(0.05)

    steps = Counter()
    losses = {}
    runs = []
    for record in (record for file in files for record in records(file)):
        if record.WhichOneof("record_type") == "run":
            runs.append(record.run)
        elif record.WhichOneof("record_type") == "history":
            row = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
            }
            if "loss" in row:
                steps[row["_step"]] += 1
                losses[row["_step"]] = row["loss"]

    saved = json.loads((folder / wandb_log.WANDB).read_text())["id"]
    assert {run.run_id for run in runs} == {saved}

    for run in runs:
        assert (run.display_name, run.project, sorted(run.tags)) == ("my-run", "p", ["a", "b"])
        sent = {
            update.key or update.nested_key[0]: update.value_json for update in run.config.update
        }
        assert json.loads(sent["model"])["block_size"] == 4

    assert steps == Counter(range(1, END + 1)), "each step once over all files"
    assert losses == pytest.approx({step: 1.0 / step for step in range(1, END + 1)})


def test_files_that_are_dropped_from_are_those_that_are_written():
    assert metrics.LOG_FILES == (
        "metrics.jsonl",
        "evaluations.jsonl",
        "saves.jsonl",
        "samples.jsonl",
    )
