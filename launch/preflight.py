"""What one node can do, measured before training: `python -m bitlm_dist.launch.preflight ATTEMPT`, one process a node.

Each writes ATTEMPT/nodes/NODE.json, first with what it measured alone, then again with what takes others: so a node that breaks the
group is the one without a file, and not those that waited for it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitlm_dist.launch.ranks import Ranks, read_ranks

from bitlm_dist.disks import free_bytes, problem_of, shared_memory_problem, temporary_problem
from bitlm_dist.files import to_json, write_atomically

if TYPE_CHECKING:
    import torch

SHARED_WITHIN = 10.0  # seconds in which a network file system shows other nodes a file
GEMM = {"cuda": (8192, 20), "cpu": (1024, 4)}  # rows, products
LINK_MB = {"cuda": 256, "cpu": 16}


def measure(attempt: Path, ranks: Ranks, node: str, gpus: int, seconds: float, checkpoints: Path) -> None:
    """Measure this node.

    Args:
        attempt: the attempt's folder.
        ranks: this process among those of all nodes.
        node: name under which the launcher knows it.
        gpus: that the node must have.
        seconds: for the group to come together.
        checkpoints: a folder on the disk where checkpoints are written.
    """
    found: dict[str, Any] = {"error": "", "clock": None, "gemm": None, "bandwidth": None}
    try:
        found["disk_gb"] = min(_disk(attempt, node), free_bytes(checkpoints) / 1e9)
        found["error"] = problem_of(checkpoints, 0) or shared_memory_problem() or temporary_problem() or _gpu_health(gpus)
        if not found["error"]:
            found["gemm"] = _gemm(gpus)
    except Exception as error:  # whatever it is, the node cannot train
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    _write(attempt, node, found)
    if found["error"]:
        sys.exit(1)
    if ranks.world > 1:
        with suppress(Exception):  # another node's failure; that one is named
            found |= _together(ranks, gpus > 0, seconds)
            _write(attempt, node, found)


def _write(attempt: Path, node: str, found: dict[str, Any]) -> None:
    write_atomically(attempt / "nodes" / f"{node}.json", to_json(found) + "\n")


def _disk(attempt: Path, node: str) -> float:
    """GB that are free where the run folder is, which must be writable."""
    probe = attempt / "nodes" / f".{node}"
    probe.write_text(node)
    probe.unlink()
    return shutil.disk_usage(attempt).free / 1e9


def _gpu_health(gpus: int) -> str:
    if not gpus:
        return ""
    import torch

    if torch.cuda.device_count() != gpus:
        return f"has {torch.cuda.device_count()} GPUs, expected {gpus}"
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if answer.returncode:
        return f"nvidia-smi says: {' '.join((answer.stdout + answer.stderr).split())}"
    for line in answer.stdout.splitlines():
        index, _, errors = line.partition(",")
        if errors.strip().isdigit() and int(errors):
            return f"GPU {index.strip()} has {errors.strip()} uncorrected memory errors"
    return ""


def _gemm(gpus: int) -> float:
    """TFLOP/s at matrix products, of the slowest GPU, or of one CPU thread."""
    import torch

    torch.set_num_threads(1)
    kind = "cuda" if gpus else "cpu"
    rows, times = GEMM[kind]
    rates = []
    for device in [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]:
        left = torch.ones(rows, rows, device=device, dtype=torch.bfloat16 if gpus else torch.float32)
        left @ left
        began = _now(device)
        for _ in range(times):
            left @ left
        rates.append(2 * rows**3 * times / (_now(device) - began) / 1e12)
    return min(rates)


def _together(ranks: Ranks, gpu: bool, seconds: float) -> dict[str, Any]:
    """The clock at one moment, and the speed of the better of the two links to the neighbours in a ring, GB/s."""
    import torch
    from torch import distributed

    kind = "cuda" if gpu else "cpu"
    distributed.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=seconds))
    ours = torch.ones(LINK_MB[kind] << 18, device=kind)
    theirs = torch.empty_like(ours)
    distributed.all_reduce(torch.ones(1, device=kind))
    clock = time.time()
    rates = []
    for parity in (0, 1):
        distributed.barrier()
        other = ranks.rank + 1 if ranks.rank % 2 == parity else ranks.rank - 1
        if not 0 <= other < ranks.world:
            continue
        for timed in (False, True):
            began = _now(ours.device)
            operations = [
                distributed.P2POp(distributed.isend, ours, other),
                distributed.P2POp(distributed.irecv, theirs, other),
            ]
            for work in distributed.batch_isend_irecv(operations):
                work.wait()
            if timed:
                rates.append(2 * ours.nbytes / (_now(ours.device) - began) / 1e9)
    distributed.barrier()
    distributed.destroy_process_group()
    return {"clock": clock, "bandwidth": max(rates)}


def _now(device: "torch.device") -> float:
    """Seconds, once the device has done what it was asked."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """The command line."""
    attempt, ranks = Path(sys.argv[1]), read_ranks(os.environ)
    end = time.monotonic() + SHARED_WITHIN
    while not (attempt / "nodes").is_dir():
        if time.monotonic() > end:
            print(
                f"bitlm: {attempt} is not there on {socket.gethostname()}: choose a run.dir that all nodes share", file=sys.stderr
            )
            sys.exit(2)
        time.sleep(0.2)
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world), LOCAL_RANK="0")
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    settings = json.loads((attempt.parents[1] / "settings.json").read_text())
    checkpoints = Path(settings.get("checkpoints") or attempt)
    measure(attempt, ranks, node, settings["gpus_per_node"], settings["preflight"]["seconds"], checkpoints)


if __name__ == "__main__":
    main()
