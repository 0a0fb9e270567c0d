"""One rank of a launched run: `python -m bitlm_dist.launch.rank train CONFIG`.

Before anything heavy is imported it ties itself to what started it, finds the attempt's folder (a run folder that nodes do not
share is seen in the first second), sends what it prints to a file of its own, binds itself to its memory, and says where it stands
in the words that torch reads. Then it becomes `bitlm`.
"""

import os
import shutil
import socket
import sys
from pathlib import Path

from bitlm_dist.launch.attempts import VARIABLE
from bitlm_dist.launch.ranks import export_ranks, read_ranks

from bitlm_dist.processes import die_with

PARENT, NUMA = "BITLM_PARENT", "BITLM_NUMA"


def main() -> None:
    """Become the rank."""
    if PARENT in os.environ:
        die_with(int(os.environ.pop(PARENT)))
    attempt, ranks = Path(os.environ[VARIABLE]), read_ranks(os.environ)
    if not (attempt / "logs").is_dir():
        print(
            f"bitlm: {attempt} is not there on {socket.gethostname()}: choose a run.dir on a file system that all nodes share",
            file=sys.stderr,
        )
        sys.exit(2)
    nodes = os.environ.pop(NUMA, "")
    if nodes:
        _bind(nodes.split(",")[ranks.local])
    log = os.open(attempt / "logs" / f"rank-{ranks.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    export_ranks(ranks, os.environ)
    os.execv(sys.executable, [sys.executable, "-u", "-m", "bitlm_dist", *sys.argv[1:]])


def _bind(node: str) -> None:
    """Start again under numactl, which is the one to bind memory as well as CPUs."""
    if shutil.which("numactl") is None:
        print(f"bitlm: numa = {node} needs numactl on {socket.gethostname()}: install it or leave numa out", file=sys.stderr)
        sys.exit(2)
    words = ["numactl", f"--cpunodebind={node}", f"--membind={node}", sys.executable, "-u", "-m", "bitlm_dist.launch.rank"]
    os.execvp("numactl", [*words, *sys.argv[1:]])


if __name__ == "__main__":
    main()
