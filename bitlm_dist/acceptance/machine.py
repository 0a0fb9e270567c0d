"""What the acceptance run is made on, as JSON: `python -m bitlm_dist.acceptance.machine gpu|cpu`.

A process of its own, as a driver may hang, and as the script itself must hold no memory of a GPU.
"""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from typing import Any

import torch

from bitlm_dist.errors import UserError
from bitlm_dist.launch.snapshot import describe_code
from bitlm_dist.package_versions import PACKAGES, package_version
from bitlm_dist.parallel.device import CPU, find_device, warning_of_unused_gpus
from bitlm_dist.planning.flops import peak_flops_of
from bitlm_dist.strict_json import to_json

OPTIONAL_PACKAGES = ("transformer-engine", "flash-attn-4", "nvidia-nccl-cu12", "nvidia-nccl-cu13")


def describe_machine(device: str) -> dict[str, Any]:
    """Card, driver, versions and commit.

    Args:
        device: ``gpu`` or ``cpu``.

    Raises:
        UserError: a GPU is asked for and there is none, or none that can be used.
    """
    on_gpu = device == "gpu"
    if on_gpu and find_device(os.environ) == CPU:
        raise UserError(
            f"there is no GPU here{_unused_gpus()}: run this where there is one, or add "
            "--device cpu (make gpu DEVICE=cpu) to test the script itself at tiny sizes"
        )

    code, _ = describe_code()
    card = torch.cuda.get_device_name(0) if on_gpu else "cpu"
    return {
        "card": card,
        "num_cards": torch.cuda.device_count() if on_gpu else 1,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "capability": list(torch.cuda.get_device_capability(0)) if on_gpu else None,
        "peak_flops": peak_flops_of(card),
        "driver": _driver_version() if on_gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {
            name: version
            for name in (*PACKAGES, *OPTIONAL_PACKAGES)
            if (version := package_version(name))
        },
        "commit": code["commit"],
        "changed": code["changed"],
    }


def _unused_gpus() -> str:
    warning = warning_of_unused_gpus()
    return f" that PyTorch can use ({warning.partition(':')[0]})" if warning else ""


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()
    return None


if __name__ == "__main__":
    try:
        print(to_json(describe_machine(sys.argv[1])))
    except UserError as error:
        print(f"bitlm: {error}", file=sys.stderr)
        sys.exit(2)
