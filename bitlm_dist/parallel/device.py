"""Select the device of a rank: its own GPU if the machine has GPUs, else the CPU.

A machine whose GPUs cannot be used is an error; a rank never falls back to the CPU silently.
"""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import torch
from torch import Tensor

from bitlm_dist.config import Config
from bitlm_dist.cpu_threads import num_local_ranks
from bitlm_dist.errors import UserError

CPU = torch.device("cpu")
CUDA_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

# the NVIDIA driver creates one of these files per GPU
DEV = Path("/dev")
GPU_FILES = "nvidia[0-9]*"


def find_device(environment: Mapping[str, str]) -> torch.device:
    """The device of the rank that ``environment`` describes.

    Args:
        environment: LOCAL_RANK and the number of ranks on this node, as torchrun, `bitlm launch` or
            Slurm set them.

    Raises:
        UserError: PyTorch cannot use the GPUs, or there are fewer GPUs than ranks.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", _gpu_index(environment, torch.cuda.device_count()))

    # a CUDA build that finds no GPU on a machine with GPUs, unless the user has hidden them
    if (
        torch.version.cuda is not None
        and num_gpus_of_machine()
        and environment.get(CUDA_VISIBLE_DEVICES) not in ("", "-1")
    ):
        raise UserError(
            f"PyTorch {torch.__version__} cannot use this machine's GPUs ({_cuda_init_error()}): "
            "install a build for the CUDA version of the driver, or a newer driver; "
            f"{CUDA_VISIBLE_DEVICES}= (empty) trains on the CPUs"
        )

    return CPU


def set_cuda_environment(config: Config, environment: MutableMapping[str, str]) -> None:
    """Set the variables that CUDA and cuBLAS read when they start, unless the user has set them."""
    if config.parallel.tensor > 1:
        # With one queue, collectives of tensor ranks start before the matmul that hides them.
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    if config.training.deterministic:
        # Otherwise sums depend on which stream was free.
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def warning_of_unused_gpus() -> str | None:
    """A one-line warning if this machine has GPUs but PyTorch was built without CUDA, else None."""
    count = num_gpus_of_machine()
    if (
        count == 0
        or torch.version.cuda is not None
        or torch.version.hip is not None
        or os.environ.get(CUDA_VISIBLE_DEVICES) in ("", "-1")
    ):
        return None

    gpus = "the GPU here is" if count == 1 else f"the {count} GPUs here are"
    return (
        f"PyTorch {torch.__version__} was built without CUDA, so {gpus} not used: "
        "install a CUDA build"
    )


def num_gpus_of_machine() -> int:
    """Number of GPUs that the NVIDIA driver has found, whether or not PyTorch can use them."""
    return len(list(DEV.glob(GPU_FILES)))


def _gpu_index(environment: Mapping[str, str], num_visible: int) -> int:
    """Index of this rank's GPU among the visible ones."""
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    num_ranks = num_local_ranks(environment)
    if local_rank < num_visible and num_ranks <= num_visible:
        return local_rank

    # If Slurm binds GPUs to tasks, each task sees only its own, numbered from 0.
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    if on_node.isdigit() and max(num_ranks, local_rank + 1) * num_visible <= int(on_node):
        return 0

    shown = (
        f"; {CUDA_VISIBLE_DEVICES}={environment[CUDA_VISIBLE_DEVICES]}"
        if CUDA_VISIBLE_DEVICES in environment
        else ""
    )
    raise UserError(
        f"LOCAL_RANK={local_rank} of {max(num_ranks, local_rank + 1)} ranks on this node has no "
        f"GPU of its own ({num_visible} visible{shown}): "
        "start one rank per GPU, or make more of them visible"
    )


def _cuda_init_error() -> str:
    """The driver's error message, shortened to its first sentence."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).partition(". ")[0].rstrip(".")
    return "no reason given"


def copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; from a CPU to a GPU through pinned memory, so that the host does not wait.

    The copy is queued on the current stream.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
