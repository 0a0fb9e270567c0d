"""What the batch script asks, and what a rank does first."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
from bitlm_dist.launch import agent, attempts
from bitlm_dist.launch.attempts import BAD_NODES, LAUNCH, REFUSED, Limits
from bitlm_dist.launch.cluster import Preflight

from bitlm_dist.errors import UserError

GOOD = {"error": "", "disk_gb": 100.0, "clock": 1000.0, "gemm": 600.0, "bandwidth": 40.0}


@pytest.fixture
def run(tmp_path):
    (tmp_path / LAUNCH).mkdir()
    settings = {
        "max_restarts": 1,
        "pause": 20,
        "limits": asdict(Limits()),
        "preflight": Preflight().model_dump(),
        "gpus_per_node": 0,
    }
    (tmp_path / LAUNCH / agent.SETTINGS).write_text(json.dumps(settings))
    return tmp_path


def ask(*words):
    command = [sys.executable, "-m", "bitlm_dist.launch.agent", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_attempt_from_beginning_to_end(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    folder, address, port = ask("begin", run, "localhost", "n1").stdout.splitlines()
    assert (folder, address) == (str(attempts.folder_of(run, 1)), "localhost")
    assert 15_000 <= int(port) < 30_000
    attempts.report_failure({attempts.VARIABLE: folder}, 1, "RuntimeError: x", lost_peer=False, refused=False)
    answer = ask("decide", run, 1)
    assert answer.stdout.splitlines()[::3] == ["restart", "20"]
    assert "attempt 1: failed: rank 1 on " in answer.stderr
    again = ask("begin", run, "localhost").stdout.splitlines()
    assert again[0].endswith("0002")
    assert again[2] != port, "sockets of the first may linger"
    answer = ask("decide", run, 1)
    assert answer.stdout.splitlines()[0] == "give up"
    assert "2 attempts in a row made no new checkpoint" in answer.stderr


def test_a_first_node_whose_name_does_not_resolve_ends_the_job(run):
    answer = ask("begin", run, "no-such-node.invalid")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("bitlm: the name of the first node, no-such-node.invalid, does not resolve on ")
    with pytest.raises(UserError):
        agent.begin(run, ["no-such-node.invalid"])
    assert attempts.read_attempts(run) == []


def write_nodes(run, number, **nodes):
    for name, values in nodes.items():
        (attempts.folder_of(run, number) / "nodes" / f"{name}.json").write_text(json.dumps({**GOOD, **values}))


def test_bad_nodes_are_excluded_and_remembered(run):
    agent.begin(run, ["localhost", "n1", "n2"])
    write_nodes(run, 1, localhost={}, n1={"gemm": 100.0}, n2={})
    assert agent.judge(run) == ["bad"]
    assert agent.decide(run, 0)[:3:2] == ["resubmit", "n1"]
    agent.begin(run, ["localhost", "n2", "n3"])
    write_nodes(run, 2, localhost={}, n2={}, n3={"error": "has 7 GPUs, expected 8"})
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "checkpoints" / "step-00000001" / "manifest.json").touch()
    assert agent.judge(run) == ["bad"]
    assert agent.decide(run, 0)[:3:2] == ["resubmit", "n1,n3"]
    assert attempts.read_attempts(run)[-1].outcome == BAD_NODES
    agent.begin(run, ["localhost"])
    write_nodes(run, 3, localhost={})
    assert agent.judge(run) == ["go"]


def test_a_folder_that_is_not_shared_is_no_fault_of_the_nodes(run):
    agent.begin(run, ["localhost", "n1", "n2"])
    write_nodes(run, 1, localhost={})
    said = f"{run} is not there on n1: choose a run.dir on a file system that all nodes share"
    (attempts.folder_of(run, 1) / "start.log").write_text(f"bitlm: {said}\n")
    assert agent.judge(run) == ["bad"]
    assert attempts.read_attempts(run)[-1].outcome == REFUSED
    action, reason, *_ = agent.decide(run, 0)
    assert action == "give up"
    assert reason == said
    assert agent.excluded(run) == []


@pytest.mark.parametrize("module", ["rank", "preflight"])
def test_a_rank_without_the_run_folder_says_so(module, tmp_path):
    gone = tmp_path / "none"
    environment = {**os.environ, attempts.VARIABLE: str(gone)}
    command = [
        sys.executable,
        "-c",
        f"import bitlm_dist.launch.{module} as m\nif hasattr(m, 'SHARED_WITHIN'): m.SHARED_WITHIN = 0\nm.main()",
    ]
    answer = subprocess.run([*command, str(gone)], env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"bitlm: {gone} is not there on ")


def test_a_node_measures_itself(run):
    folder, *_ = agent.begin(run, ["localhost"])
    environment = {**os.environ, "SLURMD_NODENAME": "localhost"}
    subprocess.run([sys.executable, "-m", "bitlm_dist.launch.preflight", folder], env=environment, check=True)
    found = json.loads((attempts.folder_of(run, 1) / "nodes" / "localhost.json").read_text())
    assert (found["error"], found["clock"], found["bandwidth"]) == ("", None, None)
    assert found["gemm"] > 0
    assert found["disk_gb"] > 0
