"""`bitlm launch` as a command: what it refuses and what it prints. Jobs are in tests/launch."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from launched_run import launched as launched

from bitlm_dist.__main__ import main
from bitlm_dist.launch.attempts import Outcome


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Function (words, code) that runs the entry point in this process; returns out and err."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["bitlm", "launch", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code == code, out + err
        return out, err

    return run


REFUSED = [  # words with RUN for an unlaunched run and FOLDER for its parent, and what is said
    ("status RUN", "does not exist"),
    ("logs RUN", "does not exist"),
    ("logs RUN --follow", "does not exist"),
    ("history RUN", "does not exist"),
    ("cancel RUN", "does not exist"),
    ("resume RUN", "does not exist"),
    ("status", "Missing argument 'RUN'"),
    ("nosuch", "No such command 'nosuch'"),
    ("local CONFIG -n 0", "Invalid value for '-n' / '--ranks'"),
    ("local CONFIG -n 3", "training.global_batch_tokens"),
    ("local", "no config file given"),
    ("local CONFIG --data.path FOLDER/nosuch", "FOLDER/nosuch"),
    ("local CONFIG --cluster nosuch", "--cluster nosuch: no such file; shipped with the package"),
    ("slurm CONFIG --time 1:2", "expected HH:MM:SS or D-HH:MM:SS"),
    ("slurm CONFIG --time 0:05:00", "leaves no time to train"),
    ("slurm CONFIG --exclude 'a b'", "'a b' is not a node name"),
    ("slurm CONFIG", "is not on the path: launch from a login node"),
    ("local CONFIG --run.dir FOLDER/foreign", "holds files but no run: choose an empty or a new"),
    ("local CONFIG --run.dir FOLDER/file", "FOLDER/file is a file: choose a folder"),
    ("local CONFIG --run.dir FOLDER/file/run", "a part of the path is a file"),
    ("local CONFIG --run.dir FOLDER/LONG", "file name too long: choose a shorter name"),
    ("local CONFIG --run.dir /proc/run", "/proc/run: no such file or directory"),
    ("local CONFIG --distillation.teacher FOLDER/none", "FOLDER/none"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_refused_is_one_line_and_leaves_nothing(
    words, said, run_main, tiny, prepared, tmp_path, monkeypatch
):
    if words.startswith("slurm"):
        monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    folder = tmp_path / "place"
    (folder / "foreign").mkdir(parents=True)
    (folder / "foreign" / "thesis.tex").touch()
    (folder / "file").touch()
    before = sorted(folder.rglob("*"))

    def fill(text):
        text = text.replace("FOLDER", str(folder)).replace("LONG", "x" * 300)
        return str(folder / "run") if text == "RUN" else text

    argv = []
    for word in shlex.split(words):
        defaults = ["--data.path", prepared, "--run.dir", folder / "run"]
        argv += [tiny.file, *defaults] if word == "CONFIG" else [fill(word)]
    out, err = run_main(*argv, code=2)
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert fill(said) in err
    assert sorted(folder.rglob("*")) == before


def test_a_full_disk_is_refused_before_anything_is_written(run_main, tiny, prepared, small_disk):
    with pytest.raises(OSError, match="No space left"), (small_disk / "fill").open("wb") as stream:
        while True:
            stream.write(bytes(2**16))
            stream.flush()
    words = ("--data.path", prepared, "--run.dir", small_disk / "run")
    _, err = run_main("local", tiny.file, *words, code=2)
    assert "no space left on device: make room on that disk" in err
    assert len(err.splitlines()) == 1
    assert os.listdir(small_disk) == ["fill"]


def test_a_folder_without_permission_is_refused(tiny, prepared, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    words = ("--data.path", prepared, "--run.dir", folder / "run")
    command = [sys.executable, "-m", "bitlm_dist", "launch", "local", tiny.file, *words]
    if os.geteuid() == 0:  # root is asked for no permission, unless it gives up that right
        if shutil.which("capsh") is None:
            pytest.skip("needs capsh, or a user other than root")
        drop = ["capsh", "--drop=cap_dac_override", "--", "-c", 'exec "$@"', "sh"]
        command = [*drop, *command]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"bitlm: run.dir cannot be used: {folder}/run: permission denied: "
        "choose another path, or ask for the permission\n"
    )
    assert os.listdir(folder) == []


def test_a_launcher_whose_output_nobody_reads_goes_on():
    script = (
        "import sys; from bitlm_dist.cli.launch import _print_log_line\n"
        "for _ in range(3): _print_log_line('step 1')\n"
        "print('goes on', file=sys.stderr)"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "goes on\n")


def test_the_history_of_a_run(run_main, launched):
    assert (
        run_main("history", launched.folder)[0].strip()
        == f"{launched.folder}: no attempt has begun"
    )
    launched.start()
    launched.train(0, 17)
    launched.save(10)
    words = "rank 1 on n1 was killed by signal 9 (SIGKILL)"
    launched.end(Outcome.FAILED, f"{words}; out of memory? see dmesg", seconds=20.0)
    launched.start()
    out, _ = run_main("history", launched.folder)
    rows = [
        [cell.strip() for cell in row.split("│")[1:-1]] for row in out.splitlines() if "│" in row
    ]
    assert [row[4:] for row in rows] == [
        ["0 to 17", "7", f"failed: {words}"],
        ["10 to 10", "–", "running"],
    ]
    assert rows[0][3] == "0.3"
    assert re.search(r"2 attempts in 0:00:2\d, 7 steps lost; 2\d % of the time was spent in", out)
    record = json.loads(run_main("history", launched.folder, "--json")[0])
    assert record["attempts"][0]["steps_lost"] == record["steps_lost"] == 7
    assert record["run"] == str(launched.folder)


def test_the_status_shows_what_is_known_and_nothing_else(run_main, launched):
    out, _ = run_main("status", launched.folder)
    assert "not begun" in out
    for row in ("job", "loss", "time left", "last attempt", "memory", "excluded", "time so far"):
        assert f"│ {row}" not in out
    launched.start()
    launched.train(0, 17, host_memory_bytes=2**30, host_memory_peak_bytes=2**31)
    launched.end(Outcome.FAILED, "rank 0 on n0: RuntimeError: x. A long hint", seconds=20.0)
    entry = {"step": 10, "validation": {"bits_per_byte": 2.5}}
    (launched.folder / "evaluations.jsonl").write_text(json.dumps(entry) + "\n")
    out, _ = run_main("status", launched.folder)
    rows = dict(
        [cell.strip() for cell in row.split("│")[1:-1]] for row in out.splitlines() if "│" in row
    )
    assert rows == {
        "state": "ended",
        "attempts": "1",
        "last attempt that ended": "failed: rank 0 on n0: RuntimeError: x",
        "step": "17 of 100",
        "loss": "2.0000",
        "validation": "2.5000 bits per byte, the best so far",
        "tokens per second": "200",
        "predicted tokens per second": "180",
        "memory of rank 0": "1 GiB, at most 2 GiB",
        "latest checkpoint": "none",
        "time so far": "0:00:20",
        "of it in lasting steps": "0 %",
    }


def test_logs_and_cancel_of_a_run_that_has_ended(run_main, launched):
    folder = launched.start()
    (folder / "logs" / "rank-0.log").write_text("step 1\n")
    launched.end(Outcome.STOPPED, "SIGINT, saved at step 1")
    out, _ = run_main("logs", launched.folder)
    assert out == "attempt 1, rank 0; stopped: SIGINT, saved at step 1\nstep 1\n"
    out, _ = run_main("logs", launched.folder, "--follow")
    assert out == "attempt 1, rank 0\nstep 1\nattempt 1: stopped: SIGINT, saved at step 1\n"
    assert (
        "has no attempt 2: it has 1 attempt"
        in run_main("logs", launched.folder, "--attempt", 2, code=2)[1]
    )
    out, _ = run_main("cancel", launched.folder)
    assert "nothing runs here; `bitlm launch resume " in out
