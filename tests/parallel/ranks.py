"""The one way in which tests start several processes: gloo ranks on this machine, each calling a function beside this file."""

import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHILD = """
import importlib, pickle, sys
import torch

torch.set_num_threads(1)
module, name, arguments, out = pickle.load(open(sys.argv[1], "rb"))
result = getattr(importlib.import_module(module), name)(*arguments)
pickle.dump(result, open(f"{out}.{sys.argv[2]}", "wb"))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def run_ranks(world: int, module: str, name: str, *arguments: Any, folder: Path, timeout: float = 300) -> list[Any]:
    """Call ``module.name(*arguments)`` in ``world`` processes -> what each returned.

    Args:
        module: beside this file.
        folder: empty; holds arguments, results and logs.
        timeout: seconds, after which all are killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    call, out = folder / "call", folder / "result"
    call.write_bytes(pickle.dumps((module, name, arguments, str(out))))
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    processes = []
    for rank in range(world):
        place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in place.items()}}
        log = (folder / f"log.{rank}").open("w")
        command = [sys.executable, "-c", CHILD, str(call), str(rank)]
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    end = time.monotonic() + timeout
    try:
        # a rank that failed leaves the others waiting for it
        while any(codes := [process.poll() for process in processes]) is False and None in codes and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, code in enumerate(codes):
        state = "did not end" if code is None else f"ended with {code}"
        assert code == 0 or (code is None and any(codes)), f"rank {rank} {state}:\n" + (folder / f"log.{rank}").read_text()[-3000:]
    return [pickle.loads(Path(f"{out}.{rank}").read_bytes()) for rank in range(world)]
