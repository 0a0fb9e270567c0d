"""The suite itself: it refuses unknown markers and cleans up after an interrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from janitor import RUN_VARIABLE, processes_of

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent
BUSY = """
import json, os, signal, subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
from bitlm_dist.data.stale_resources import owner_tagged_name

def test_that_is_cut_short(tmp_path):
    stubborn = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; "
    stubborn += "print('on', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", stubborn]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    memory = SharedMemory(owner_tagged_name("block"), create=True, size=8)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)
    found = {"run": os.environ["BITLM_TEST_RUN"], "folder": str(tmp_path), "memory": memory.name}
    open(os.environ["TOLD"], "w").write(json.dumps(found))
    time.sleep(600)
"""


def pytest_command(*words: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pytest",
        "--rootdir",
        str(HERE.parent),
        "-c",
        str(HERE.parent / "pyproject.toml"),
        *words,
    ]


def outside() -> dict[str, str]:
    """Environment without this run's variables, as of a user who starts another run."""
    inside = (RUN_VARIABLE, "PYTEST_XDIST_WORKER", "TMPDIR")
    return {name: value for name, value in os.environ.items() if name not in inside}


@pytest.mark.parametrize(
    ("expression", "message"),
    [("slwo", "did you mean slow?"), ("slow and not gpus", "did you mean gpu?")],
)
def test_a_marker_that_does_not_exist_is_named(expression, message):
    words = pytest_command("-m", expression, str(HERE / "test_suite.py"))
    done = subprocess.run(words, env=outside(), capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr.count("\n") <= 2
    assert f"-m {expression}: no test has the marker" in done.stderr
    assert message in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_cut_short_leaves_nothing(number, tmp_path):
    """Neither a process that ignores signals, nor a mount, a folder or shared memory."""
    told = tmp_path / "told"
    module = HERE / f"test_busy_{os.getpid()}.py"
    module.write_text(BUSY)  # beside the suite's conftest.py
    try:
        words = pytest_command(str(module))
        run = subprocess.Popen(
            words,
            env={**outside(), "TOLD": str(told)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # a background job of a shell ignores SIGINT
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        until(lambda: told.exists() and told.read_text())
        found = json.loads(told.read_text())

        run.send_signal(number)
        assert run.wait(120) != 0
        until(lambda: not list(processes_of(found["run"])))
        until(lambda: not Path(found["folder"]).parents[1].exists())
        until(lambda: not Path("/dev/shm", found["memory"]).exists())
    finally:
        module.unlink()


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
