"""OpenMP's and MKL's variables, as a launcher leaves them and as a process starts with them."""

import os
import subprocess
import sys

import pytest

from bitlm_dist import cpu_threads
from bitlm_dist.cpu_threads import num_local_ranks, set_cpu_environment

WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": cpu_threads.DEFAULT_SPIN_COUNT}


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, None),
        ({"LOCAL_WORLD_SIZE": "1"}, None),
        ({"LOCAL_WORLD_SIZE": "3"}, "2"),
        ({"LOCAL_WORLD_SIZE": "20"}, "1"),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, "3"),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, "1"),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, "4"),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, "2"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),2", "SLURM_NODEID": "1", "SLURM_PROCID": "5"}, "2"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),2", "SLURM_NODEID": "2", "SLURM_PROCID": "8"}, "4"),
        # the job has four of the node's eight cores
        (
            {
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_NODEID": "0",
                "SLURM_PROCID": "0",
                "SLURM_CPUS_ON_NODE": "4",
            },
            "2",
        ),
        # Slurm has bound each rank to its own eight of sixteen
        (
            {
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_NODEID": "0",
                "SLURM_PROCID": "0",
                "SLURM_CPUS_ON_NODE": "16",
            },
            "8",
        ),
    ],
)
def test_ranks_share_the_cores_unless_the_user_says_otherwise(given, threads, eight_cores):
    environment = dict(given)
    set_cpu_environment(environment)
    assert environment.get("OMP_NUM_THREADS") == threads
    assert environment.items() >= WAITING.items()


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_how_the_user_lets_threads_wait_stays(given):
    environment = dict(given)
    set_cpu_environment(environment)
    assert environment == {**given, "MKL_CBWR": "AUTO"}


def test_products_do_not_depend_on_where_their_operands_lie():
    """Without MKL_CBWR some of these differ in their last bits on CPUs with AVX2."""
    import torch

    def moved(matrix, offset):
        """Copy to ``offset`` bytes after an address that is a multiple of 64."""
        memory = torch.empty(matrix.nbytes + 128, dtype=torch.uint8)
        start = -memory.data_ptr() % 64 + offset
        return (
            memory[start : start + matrix.nbytes]
            .view(matrix.dtype)
            .view(matrix.shape)
            .copy_(matrix)
        )

    torch.manual_seed(0)
    for rows, columns in [(2, 32), (64, 9)]:
        inputs = torch.randn(rows, 32)
        weight = torch.randn(columns, 32)
        bias = torch.randn(columns)
        expected = torch.nn.functional.linear(moved(inputs, 0), weight, bias)
        for offset in (4, 8, 16, 32):
            assert torch.equal(
                torch.nn.functional.linear(moved(inputs, offset), weight, bias), expected
            ), (rows, offset)


@pytest.mark.parametrize(
    ("tasks", "node", "ranks"),
    [("3", "0", 3), ("2(x3),1", "2", 2), ("2(x3),1", "3", 1), ("", "0", 1), ("2", "x", 2)],
)
def test_ranks_on_a_node_of_slurm(tasks, node, ranks):
    assert num_local_ranks({"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}) == ranks


def test_the_command_sets_them_before_torch_is_loaded():
    """Runs in a separate process, as torch is loaded in this one."""
    script = """
import os, sys
import typer
import bitlm_dist.cli
def app(**settings):
    assert "torch" not in sys.modules
    assert "numpy" not in sys.modules
    print(os.environ["OMP_WAIT_POLICY"])
bitlm_dist.cli.app = app
from bitlm_dist.__main__ import main
main()
"""

    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "passive\n"
