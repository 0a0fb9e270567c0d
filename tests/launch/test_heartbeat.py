"""Processes with only a heartbeat: which rank is reported as hung, and that the others exit."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import Limits
from bitlm_dist.launch.heartbeat import Heartbeat

pytestmark = pytest.mark.integration

QUICK = Limits(heartbeat_interval=0.1, heartbeat_timeout=1.0, step_timeout=1.5, startup_timeout=3.0)
RANK = """
import os, sys, time
from bitlm_dist.launch.heartbeat import Heartbeat

rank, world, steps = map(int, sys.argv[1:4])
began = time.monotonic()
with Heartbeat.from_environment(os.environ, rank, world) as heartbeat:
    heartbeat.track_steps(lambda: min(steps, int((time.monotonic() - began) / 0.1)))
    print("beats", flush=True)
    time.sleep(float(sys.argv[4]))
"""


@pytest.fixture
def start(tmp_path):
    processes = []

    def make(world, steps, seconds=60.0, limits=QUICK):
        folder = attempts.create_attempt(tmp_path, "", 0, ["here"], limits)
        environment = {**os.environ, attempts.ATTEMPT_VARIABLE: str(folder)}
        for rank in range(world):
            words = [
                sys.executable,
                "-c",
                RANK,
                str(rank),
                str(world),
                str(steps[rank]),
                str(seconds),
            ]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            processes.append(subprocess.Popen(words, env=environment, text=True, **streams))
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "beats\n"
        return folder, processes

    yield make
    for process in processes:
        process.kill()
        process.communicate()


def test_a_stopped_process_is_named_by_the_one_before_it_and_the_others_end(start):
    folder, processes = start(4, [1000] * 4)
    processes[2].send_signal(signal.SIGSTOP)
    for rank in (0, 1, 3):
        assert processes[rank].wait(20) == 1
    hung = json.loads((folder / "hung.json").read_text())
    assert (hung["rank"], hung["noticed_by"], hung["host"]) == (2, 1, os.uname().nodename)
    assert hung["what"].startswith("gave no sign of life for ")
    assert 'File "<string>", line' in processes[0].stderr.read(), "where its threads were"


def test_a_pause_of_all_accuses_nobody(start):
    folder, processes = start(4, [1000] * 4)
    time.sleep(0.5)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    for process in reversed(processes):
        process.send_signal(signal.SIGCONT)
    time.sleep(1.5)
    assert [process.poll() for process in processes] == [None] * 4
    assert not (folder / "hung.json").exists()


def test_ranks_that_make_no_step_are_noticed_and_the_slowest_is_named(start):
    folder, processes = start(3, [20, 19, 20])
    for process in processes:
        assert process.wait(20) == 1
    hung = json.loads((folder / "hung.json").read_text())
    assert (hung["rank"], hung["noticed_by"]) == (1, 0)
    assert hung["what"].startswith("is at step 19, and no step was made for ")


def test_the_first_step_may_take_longer(start):
    began = time.monotonic()
    folder, processes = start(1, [0], limits=replace(QUICK, step_timeout=0.5, startup_timeout=2.0))
    assert processes[0].wait(20) == 1
    assert time.monotonic() - began > 2.0
    assert "is at step 0" in json.loads((folder / "hung.json").read_text())["what"]


def test_ranks_that_end_in_peace_are_not_missed(start):
    folder, processes = start(2, [1000, 1000], seconds=2.0)
    assert [process.wait(20) for process in processes] == [0, 0]
    assert not (folder / "hung.json").exists()
    assert list((folder / "beats").iterdir()) == []


def test_a_full_disk_is_no_hang(tmp_path, monkeypatch):
    folder = attempts.create_attempt(tmp_path, "", 0, ["here"], QUICK)
    watching, watched = (Heartbeat(folder, QUICK, rank, 2) for rank in (0, 1))
    file = folder / "beats" / "rank-1"

    def is_full(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", is_full)
    with pytest.raises(OSError, match="No space"):
        watched._write_beat()  # a rank without a first beat could never be watched

    file.write_bytes(b'{"begun": true, "host": "here", "step": 3}')
    os.utime(file, (0, 0))
    watching._check_next_rank()
    watched._write_beat()
    assert file.stat().st_mtime > 0
    watching._next_beat_at = -QUICK.heartbeat_timeout  # long ago
    watching._check_next_rank()
    assert not (folder / "hung.json").exists()
    watching._next_beat_at = time.monotonic() - 2 * QUICK.heartbeat_timeout
    monkeypatch.undo()
    watching._check_next_rank()
    assert json.loads((folder / "hung.json").read_text())["rank"] == 1, "without a new time it is"
