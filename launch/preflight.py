"""Preflight measurements, one process per node: `python -m bitlm_dist.launch.preflight ATTEMPT`.

Each process writes ATTEMPT/nodes/NODE.json twice: first with the measurements of the node alone,
then with those that need other nodes added. So if a node breaks the process group, only that node
has no file, and those that waited for it have one.
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

from bitlm_dist.disks import free_bytes, shared_memory_problem, temp_dir_problem, write_problem
from bitlm_dist.files import write_atomically
from bitlm_dist.launch.rank_info import RankInfo, read_rank_info
from bitlm_dist.strict_json import to_json

if TYPE_CHECKING:
    import torch

# seconds until a network file system must show a new folder to the other nodes
SHARED_FOLDER_TIMEOUT = 10.0
GEMM_SIZES = {"cuda": (8192, 20), "cpu": (1024, 4)}  # rows, number of products
LINK_MB = {"cuda": 256, "cpu": 16}


def measure_node(
    attempt: Path,
    rank_info: RankInfo,
    node: str,
    num_gpus: int,
    timeout_seconds: float,
    checkpoints: Path,
) -> None:
    """Measure this node and write its results; exit with code 1 if it cannot be used.

    Args:
        attempt: the attempt folder.
        rank_info: rank of this process among the processes of all nodes.
        node: name by which the launcher knows this node.
        num_gpus: number of GPUs that the node must have.
        timeout_seconds: for the process group to come up.
        checkpoints: a folder on the disk where checkpoints are written.
    """
    result: dict[str, Any] = {"error": "", "clock": None, "gemm": None, "bandwidth": None}

    try:
        result["disk_gb"] = min(_free_disk_gb(attempt, node), free_bytes(checkpoints) / 1e9)
        result["error"] = (
            write_problem(checkpoints, 0)
            or shared_memory_problem()
            or temp_dir_problem()
            or _gpu_problem(num_gpus)
        )
        if not result["error"]:
            result["gemm"] = _gemm_tflops(num_gpus)
    except Exception as error:  # whatever it is, the node cannot train
        result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"

    # written before the group comes up, because another node may break it
    _write(attempt, node, result)
    if result["error"]:
        sys.exit(1)

    if rank_info.world_size > 1:
        with suppress(Exception):  # the fault of another node, which is reported by its own file
            result |= _clock_and_bandwidth(rank_info, num_gpus > 0, timeout_seconds)
            _write(attempt, node, result)


def _write(attempt: Path, node: str, result: dict[str, Any]) -> None:
    write_atomically(attempt / "nodes" / f"{node}.json", to_json(result) + "\n")


def _free_disk_gb(attempt: Path, node: str) -> float:
    """Free space on the run folder's disk in GB. The folder must be writable."""
    probe = attempt / "nodes" / f".{node}"
    probe.write_text(node)
    probe.unlink()
    return shutil.disk_usage(attempt).free / 1e9


def _gpu_problem(num_gpus: int) -> str:
    """Describe missing GPUs or uncorrected memory errors; empty if all is well."""
    if not num_gpus:
        return ""

    import torch

    if torch.cuda.device_count() != num_gpus:
        return f"has {torch.cuda.device_count()} GPUs, expected {num_gpus}"

    # containers may lack nvidia-smi
    if shutil.which("nvidia-smi") is None:
        return ""

    query = [
        "nvidia-smi",
        "--query-gpu=index,ecc.errors.uncorrected.volatile.total",
        "--format=csv,noheader,nounits",
    ]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if answer.returncode:
        return f"nvidia-smi says: {' '.join((answer.stdout + answer.stderr).split())}"

    # GPUs without ECC answer "[N/A]"
    for line in answer.stdout.splitlines():
        index, _, errors = line.partition(",")
        if errors.strip().isdigit() and int(errors):
            return f"GPU {index.strip()} has {errors.strip()} uncorrected memory errors"

    return ""


def _gemm_tflops(num_gpus: int) -> float:
    """Matrix product speed in TFLOP/s of the slowest GPU, or of one CPU thread."""
    import torch

    torch.set_num_threads(1)
    device_type = "cuda" if num_gpus else "cpu"
    rows, num_products = GEMM_SIZES[device_type]

    rates = []
    for device in [torch.device("cuda", i) for i in range(num_gpus)] or [torch.device("cpu")]:
        left = torch.ones(
            rows, rows, device=device, dtype=torch.bfloat16 if num_gpus else torch.float32
        )
        left @ left  # not timed: the first product loads libraries

        began = _synchronized_time(device)
        for _ in range(num_products):
            left @ left
        rates.append(2 * rows**3 * num_products / (_synchronized_time(device) - began) / 1e12)

    return min(rates)


def _clock_and_bandwidth(rank_info: RankInfo, gpu: bool, timeout_seconds: float) -> dict[str, Any]:
    """Measure the clock right after a collective, and the bandwidth to the neighbours.

    The bandwidth, in GB/s, is that of the better of the two links to the previous and next rank, so
    that a node is not blamed for a slow neighbour. Collective.
    """
    import torch
    from torch import distributed

    device_type = "cuda" if gpu else "cpu"
    distributed.init_process_group(
        "nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout_seconds)
    )
    send_buffer = torch.ones(LINK_MB[device_type] << 18, device=device_type)
    receive_buffer = torch.empty_like(send_buffer)

    # all nodes leave the collective at nearly the same moment, so their clocks can be compared
    distributed.all_reduce(torch.ones(1, device=device_type))
    clock = time.time()

    # ranks pair up first with one neighbour, then with the other
    rates = []
    for parity in (0, 1):
        distributed.barrier()
        peer = rank_info.rank + 1 if rank_info.rank % 2 == parity else rank_info.rank - 1
        if not 0 <= peer < rank_info.world_size:
            continue

        # the first exchange sets up the connection and is not timed
        for timed in (False, True):
            began = _synchronized_time(send_buffer.device)
            operations = [
                distributed.P2POp(distributed.isend, send_buffer, peer),
                distributed.P2POp(distributed.irecv, receive_buffer, peer),
            ]
            for work in distributed.batch_isend_irecv(operations):
                work.wait()

            if timed:
                rates.append(
                    2 * send_buffer.nbytes / (_synchronized_time(send_buffer.device) - began) / 1e9
                )

    distributed.barrier()
    distributed.destroy_process_group()
    return {"clock": clock, "bandwidth": max(rates)}


def _synchronized_time(device: "torch.device") -> float:
    """Time in seconds, after the device has finished all queued work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Run the command line."""
    attempt = Path(sys.argv[1])
    rank_info = read_rank_info(os.environ)

    end = time.monotonic() + SHARED_FOLDER_TIMEOUT
    while not (attempt / "nodes").is_dir():
        if time.monotonic() > end:
            print(
                f"bitlm: {attempt} is not there on {socket.gethostname()}: "
                "choose a run.dir that all nodes share",
                file=sys.stderr,
            )
            sys.exit(2)
        time.sleep(0.2)

    # torch.distributed reads these; srun sets only its own
    os.environ.update(
        RANK=str(rank_info.rank), WORLD_SIZE=str(rank_info.world_size), LOCAL_RANK="0"
    )
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    settings = json.loads((attempt.parents[1] / "settings.json").read_text())
    checkpoints = Path(settings.get("checkpoints") or attempt)

    measure_node(
        attempt,
        rank_info,
        node,
        settings["gpus_per_node"],
        settings["preflight"]["seconds"],
        checkpoints,
    )


if __name__ == "__main__":
    main()
