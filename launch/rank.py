"""Entry point of one rank of a launched run: `python -m bitlm_dist.launch.rank train CONFIG`.

It replaces itself by `bitlm` after a set-up that must come before any heavy import:

1. tie its life to its parent process,
2. check that the attempt folder is visible, which detects within the first second a run folder that
   is not shared between the nodes,
3. bind its CPUs and memory to a NUMA node,
4. redirect its output to its own log file,
5. export its rank in the environment variables that torch reads, and defaults for GPUs.
"""

import os
import shutil
import socket
import sys
from collections.abc import MutableMapping
from pathlib import Path

from bitlm_dist.formatting import format_time
from bitlm_dist.launch.attempts import ATTEMPT_VARIABLE
from bitlm_dist.launch.rank_info import export_rank_info, read_rank_info
from bitlm_dist.processes import die_with_parent

PARENT_VARIABLE = "BITLM_PARENT"
NUMA_VARIABLE = "BITLM_NUMA"

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second: its old name
GPU_DEFAULTS = {
    "NCCL_DEBUG": "WARN",  # otherwise NCCL does not say why it failed
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",  # a rank that lost its peers ends instead of hanging
}


def main() -> None:
    """Set up this process and replace it by `bitlm`."""
    if PARENT_VARIABLE in os.environ:
        die_with_parent(int(os.environ.pop(PARENT_VARIABLE)))

    attempt = Path(os.environ[ATTEMPT_VARIABLE])
    rank_info = read_rank_info(os.environ)
    if not (attempt / "logs").is_dir():
        print(
            f"bitlm: {attempt} is not there on {socket.gethostname()}: "
            "choose a run.dir on a file system that all nodes share",
            file=sys.stderr,
        )
        sys.exit(2)

    # removed from the environment, because numactl starts this program a second time
    numa_nodes = os.environ.pop(NUMA_VARIABLE, "")
    if numa_nodes:
        _exec_under_numactl(numa_nodes.split(",")[rank_info.local_rank])

    # at the level of file descriptors, so that output of C++ libraries is in the log, too
    log = os.open(
        attempt / "logs" / f"rank-{rank_info.rank}.log",
        os.O_WRONLY | os.O_CREAT | os.O_APPEND,
        0o644,
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    print(
        f"{format_time()} bitlm: rank {rank_info.rank} of {rank_info.world_size} on "
        f"{socket.gethostname()}, process {os.getpid()}",
        flush=True,
    )

    export_rank_info(rank_info, os.environ)
    set_gpu_defaults(os.environ)
    os.execv(sys.executable, [sys.executable, "-u", "-m", "bitlm_dist", *sys.argv[1:]])


def set_gpu_defaults(environment: MutableMapping[str, str]) -> None:
    """Set what torch and NCCL read when they are loaded, unless the user has set it."""
    for name, value in GPU_DEFAULTS.items():
        environment.setdefault(name, value)

    # blocks that grow in place: batches of other shapes, evaluations and saves leave no gaps
    if not any(name in environment for name in ALLOCATOR_VARIABLES):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def _exec_under_numactl(node: str) -> None:
    """Restart this process under numactl, which can bind memory as well as CPUs."""
    if shutil.which("numactl") is None:
        print(
            f"bitlm: numa = {node} needs numactl on {socket.gethostname()}: "
            "install it or leave numa out",
            file=sys.stderr,
        )
        sys.exit(2)

    words = [
        "numactl",
        f"--cpunodebind={node}",
        f"--membind={node}",
        sys.executable,
        "-u",
        "-m",
        "bitlm_dist.launch.rank",
    ]
    os.execvp("numactl", [*words, *sys.argv[1:]])


if __name__ == "__main__":
    main()
