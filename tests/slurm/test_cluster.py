"""The test cluster behaves like a real cluster."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from .cluster import free_ports

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# the tasks meet on the first node, found by its name; each prints the names that all have sent
MEET = """
import os, socket, sys
rank = int(os.environ["SLURM_PROCID"])
size = int(os.environ["SLURM_NTASKS"])
host = sys.argv[1]
port = int(sys.argv[2])
name = os.environ["SLURMD_NODENAME"]
assert socket.gethostname() == name
if rank == 0:
    server = socket.create_server((socket.gethostbyname(name), port))
    peers = [server.accept()[0] for _ in range(size - 1)]
    names = sorted([name, *(peer.makefile().readline().strip() for peer in peers)])
    for peer in peers:
        peer.sendall((" ".join(names) + "\\n").encode())
else:
    while True:
        try:
            peer = socket.create_connection((host, port))
            break
        except ConnectionRefusedError:
            pass
    peer.sendall(f"{name}\\n".encode())
    names = peer.makefile().readline().split()
print("met", *names)
"""
OWNER = """
import sys, time
from pathlib import Path
from cluster import Cluster
cluster = Cluster(nodes=1, folder=Path(sys.argv[1]))
cluster.start()
cluster.submit("sleep 1000", output="/dev/null")
print(cluster.state_dir, flush=True)
time.sleep(1000)
"""


def until(condition, timeout=30):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def processes_of(folder) -> list[str]:
    """Command lines of daemons and tasks: those that name the folder, also in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(str(folder) in word for word in words):
            found.append(" ".join(process.cmdline()))
    return found


@pytest.fixture
def output(tmp_path):
    """Output file of a job."""
    return tmp_path / "output"


def test_four_nodes_are_idle(cluster):
    assert cluster.run("sinfo", "--noheader", "--partition=main", "--format=%D %t %N").split() == [
        "4",
        "idle",
        "n[0-3]",
    ]
    assert cluster.run("sinfo", "--noheader", "--format=%P").split() == ["main*", "high"]


def test_job_over_four_nodes(cluster, output):
    job = cluster.submit(
        "srun hostname", "--nodes=4", "--job-name=a name with = in it", output=output
    )
    assert cluster.wait(job) == "COMPLETED"
    assert sorted(output.read_text().split()) == cluster.names
    shown = cluster.show(job)
    assert (shown["JobName"], shown["NumNodes"], shown["StdOut"]) == (
        "a name with = in it",
        "4",
        str(output),
    )


def test_srun_from_outside(cluster):
    assert sorted(cluster.run("srun", "--nodes=2", "hostname").split()) == ["n0", "n1"]


def test_nodes_meet_by_name(cluster, output, tmp_path):
    (tmp_path / "meet.py").write_text(MEET)
    first_node = "$(scontrol show hostnames | head -n 1)"
    script = f'srun {sys.executable} -S {tmp_path}/meet.py "{first_node}" {free_ports(1)[0]}'
    cluster.wait(cluster.submit(script, "--nodes=4", output=output))
    assert output.read_text().splitlines() == 4 * ["met n0 n1 n2 n3"]


def test_a_dead_task_fails_its_job(cluster, output):
    job = cluster.submit("echo hello; srun sleep 1000", "--nodes=2", output=output)
    until(lambda: len(cluster.pids(job)) == 2)
    tasks = cluster.pids(job)
    assert list(cluster.pids(job, step="batch")) == ["n0"]
    os.kill(tasks["n1"][0], signal.SIGKILL)
    with pytest.raises(AssertionError, match=r"(?s)JobState=FAILED Reason=NonZeroExitCode.*hello"):
        cluster.wait(job)
    assert not any(psutil.pid_exists(pid) for pids in tasks.values() for pid in pids)


def test_signal_reaches_the_batch_shell(cluster, output):
    job = cluster.submit(
        "trap 'echo trapped' USR2; echo ready; sleep 1000 & wait; echo on", output=output
    )
    until(lambda: output.exists() and "ready" in output.read_text())
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    cluster.wait(job)
    assert output.read_text().split() == ["ready", "trapped", "on"]


def test_wait_says_what_a_job_does_at_its_timeout(cluster, output):
    job = cluster.submit("sleep 1000", "--hold", output=output)
    with pytest.raises(AssertionError, match=r"JobState=PENDING Reason=JobHeldUser"):
        cluster.wait(job, timeout=0.2)


def test_idle_resumes_nodes(cluster):
    cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    cluster.kill_node(3)
    cluster.wait_until_idle()
    assert cluster.run("sinfo", "--noheader", "--partition=main", "--format=%D %t").split() == [
        "4",
        "idle",
    ]


def test_a_second_cluster_with_gpus_beside_leaves_nothing(cluster, make_cluster, output):
    hosts = Path("/etc/hosts").read_text()
    second = make_cluster(nodes=2, gpus_per_node=4)
    second.start()
    state = second.state_dir
    try:
        job = second.submit(
            "srun bash -c 'echo $CUDA_VISIBLE_DEVICES; sleep 1000 & disown; sleep 1000'",
            "--gpus=4",
            output=output,
        )
        until(lambda: output.exists() and output.read_text().strip() == "0,1,2,3")
        assert job not in cluster.run("squeue")
        text = second.run(
            "sbatch", "--test-only", "--gpus-per-node=5", script="#!/bin/bash\n", check=False
        )
        assert "Requested node configuration is not available" in text
        assert len(processes_of(state)) > 8
    finally:
        second.stop()
    assert not processes_of(state)
    assert not state.exists()
    assert Path("/etc/hosts").read_text() == hosts
    second.stop()  # once more is fine
    cluster.wait_until_idle(timeout=5)


def test_a_failed_start_leaves_nothing(make_cluster):
    broken = make_cluster(nodes=1, cpus_per_node=-1)
    # the controller and the node refuse the configuration alike, and either may end first
    with pytest.raises(RuntimeError, match="(control|n0) .*ended before"):
        broken.start(timeout=20)
    assert not processes_of(broken.folder)
    assert not list(broken.folder.iterdir())


def test_a_killed_owner_leaves_no_process(make_cluster):
    words = [sys.executable, "-c", OWNER, str(make_cluster().folder)]
    owner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    state = owner.stdout.readline().strip()
    assert state
    until(lambda: "sleep 1000" in processes_of(state))
    owner.kill()
    owner.wait()
    until(lambda: not processes_of(state), timeout=5)
