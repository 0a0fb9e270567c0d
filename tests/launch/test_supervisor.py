"""Supervisor commands of the batch script, and the set-up of a rank."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from bitlm_dist.launch import attempts, supervisor
from bitlm_dist.launch.attempts import LAUNCH, Limits, Outcome
from bitlm_dist.launch.cluster import Preflight

pytestmark = pytest.mark.integration

GOOD = {"error": "", "disk_gb": 100.0, "clock": 1000.0, "gemm": 600.0, "bandwidth": 40.0}


@pytest.fixture
def run(tmp_path):
    (tmp_path / LAUNCH).mkdir()
    settings: dict[str, object] = {
        "submission": "1",
        "exclude": ["n9"],
        "max_restarts": 1,
        "pause": 20,
        "gpus_per_node": 0,
    }
    settings |= {"limits": asdict(Limits()), "preflight": Preflight().model_dump()}
    (tmp_path / LAUNCH / supervisor.SETTINGS).write_text(json.dumps(settings))
    return tmp_path


def ask(*words, module="supervisor"):
    command = [sys.executable, "-m", f"bitlm_dist.launch.{module}", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_attempt_from_beginning_to_end(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    folder, address, port = ask("start-attempt", run, "localhost", "n1").stdout.splitlines()
    assert (folder, address) == (str(attempts.attempt_folder(run, 1)), "localhost")
    assert 15_000 <= int(port) < 30_000
    attempts.report_failure(
        {attempts.ATTEMPT_VARIABLE: folder}, 1, "RuntimeError: x", lost_peer=False, refused=False
    )
    answer = ask("finish-attempt", folder, 1)
    assert answer.stdout.splitlines()[::3] == ["restart", "20"]
    assert "attempt 1: failed: rank 1 on " in answer.stderr
    again = ask("start-attempt", run, "localhost").stdout.splitlines()
    assert again[0].endswith("0002")
    assert again[2] != port, "sockets of the first may linger"
    answer = ask("finish-attempt", again[0], 1)
    assert answer.stdout.splitlines()[0] == "give up"
    assert "2 attempts in a row made no new checkpoint" in answer.stderr
    settings = json.loads((run / LAUNCH / supervisor.SETTINGS).read_text())
    (run / LAUNCH / supervisor.SETTINGS).write_text(
        json.dumps({**settings, "submission": "2", "pause": 200, "max_restarts": 9})
    )
    for wait in ("200", "300", "300"):  # counted from the new submission on
        folder = ask("start-attempt", run, "localhost").stdout.splitlines()[0]
        assert ask("finish-attempt", folder, 1).stdout.splitlines()[::3] == ["restart", wait]


OLD_LIMITS = {"beat": 1.0, "frozen": 4.0, "stalled": 50.0, "start": 60.0}


def test_a_job_of_an_earlier_version_goes_on(run):
    file = run / LAUNCH / supervisor.SETTINGS
    file.write_text(json.dumps({**json.loads(file.read_text()), "limits": OLD_LIMITS}))
    folder = ask("begin", run, "localhost", module="agent").stdout.splitlines()[0]
    assert attempts.read_attempt(Path(folder)).limits == Limits(1.0, 4.0, 50.0, 60.0)
    (Path(folder) / "nodes" / "localhost.json").write_text(json.dumps(GOOD))
    assert ask("judge", folder, module="agent").stdout == "go\n"
    assert ask("left_out", run, module="agent").stdout == "n9\n"
    answer = ask("decide", folder, 1, module="agent").stdout.splitlines()
    assert answer[::3] == ["restart", "20"]


def test_a_late_launcher_decides_on_its_own_attempt(run):
    first, second = (supervisor.start_attempt(run, ["localhost"])[0] for _ in range(2))
    attempts.report_outcome({attempts.ATTEMPT_VARIABLE: second}, "done", 5, "")
    assert supervisor.finish_attempt(Path(first), 1)[0] == "restart"
    assert supervisor.finish_attempt(Path(second), 1)[0] == "end"


def test_a_first_node_whose_name_does_not_resolve_ends_the_job(run):
    answer = ask("start-attempt", run, "no-such-node.invalid")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith(
        "bitlm: the name of the first node, no-such-node.invalid, does not resolve on "
    )
    assert attempts.read_attempts(run) == []


def begun(run, *nodes, **measured):
    """Start an attempt with preflight measurements of its nodes."""
    folder = Path(supervisor.start_attempt(run, list(nodes))[0])
    for name, values in measured.items():
        (folder / "nodes" / f"{name}.json").write_text(json.dumps({**GOOD, **values}))
    return folder


def test_bad_nodes_are_left_out_and_remembered(run):
    folder = begun(run, "n0", "n1", "n2", n0={}, n1={"error": "has 7 GPUs, expected 8"}, n2={})
    assert supervisor.check_nodes(folder) == ["bad"]
    assert supervisor.finish_attempt(folder, 0)[:3:2] == ["resubmit", "n1,n9"]
    folder = begun(run, "n0", "n2", "n3", n0={}, n2={}, n3={"disk_gb": 1.0})
    assert supervisor.check_nodes(folder) == ["bad"]
    assert supervisor.finish_attempt(folder, 0)[:3:2] == ["resubmit", "n1,n3,n9"], (
        "bad nodes are no restarts"
    )
    assert attempts.read_attempts(run)[-1].outcome == Outcome.BAD_NODES
    assert supervisor.check_nodes(begun(run, "n0", n0={})) == ["go"]
    assert ask("excluded", run).stdout == "n1,n3,n9\n"


def test_where_most_nodes_look_bad_none_is_left_out(run):
    folder = begun(
        run, "n0", "n1", "n2", "n3", n0={}, n1={}, n2={"disk_gb": 5.0}, n3={"disk_gb": 5.0}
    )
    assert supervisor.check_nodes(folder) == ["bad"]
    action, reason, exclude, _ = supervisor.finish_attempt(folder, 0)
    assert (action, exclude) == ("restart", "")
    assert (
        reason == "most nodes look bad, so none is left out: "
        "n2: 5.0 GB free for the run folder, expected 10.0; "
        "n3: 5.0 GB free for the run folder, expected 10.0"
    )
    assert supervisor.excluded_nodes(run) == ["n9"]


@pytest.mark.parametrize("nodes", [("n0", "n1"), ("n0", "n1", "n2")])
def test_a_folder_that_is_not_shared_is_no_fault_of_the_nodes(run, nodes):
    folder = begun(run, *nodes, n0={})
    said = f"{run} is not there on n1: choose a run.dir on a file system that all nodes share"
    (folder / "start.log").write_bytes(b"\xff noise\nbitlm: " + said.encode() + b"\n")
    assert supervisor.check_nodes(folder) == ["bad"]
    assert attempts.read_attempts(run)[-1].outcome == Outcome.REFUSED
    action, reason, *_ = supervisor.finish_attempt(folder, 0)
    assert (action, reason) == ("give up", said)
    assert supervisor.excluded_nodes(run) == ["n9"]


@pytest.mark.parametrize("module", ["rank", "preflight"])
def test_a_rank_without_the_run_folder_says_so(module, tmp_path):
    gone = tmp_path / "none"
    environment = {**os.environ, attempts.ATTEMPT_VARIABLE: str(gone)}
    script = (
        f"import bitlm_dist.launch.{module} as module\n"
        "module.SHARED_FOLDER_TIMEOUT = 0\nmodule.main()"
    )
    command = [sys.executable, "-c", script]
    answer = subprocess.run(
        [*command, str(gone)], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"bitlm: {gone} is not there on ")


def test_a_node_measures_itself(run):
    folder, *_ = supervisor.start_attempt(run, ["localhost"])
    environment = {**os.environ, "SLURMD_NODENAME": "localhost"}
    subprocess.run(
        [sys.executable, "-m", "bitlm_dist.launch.preflight", folder], env=environment, check=True
    )
    found = json.loads((attempts.attempt_folder(run, 1) / "nodes" / "localhost.json").read_text())
    assert (found["error"], found["clock"], found["bandwidth"]) == ("", None, None)
    assert found["gemm"] > 0
    assert found["disk_gb"] > 0
