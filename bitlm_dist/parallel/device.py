"""Which device a process computes on: its own GPU where there are GPUs, the CPU elsewhere; never a CPU by mistake."""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import torch

from bitlm_dist.config import Config
from bitlm_dist.cpu_threads import num_local_ranks
from bitlm_dist.errors import UserError

CPU = torch.device("cpu")
VISIBLE = "CUDA_VISIBLE_DEVICES"
DEV, GPU_FILES = Path("/dev"), "nvidia[0-9]*"  # the driver makes one for each GPU


def find_device(environment: Mapping[str, str]) -> torch.device:
    """The device of the rank that ``environment`` describes.

    Args:
        environment: LOCAL_RANK and the number of ranks on this node, as torchrun, `bitlm launch` or Slurm set them.

    Raises:
        UserError: there are GPUs that PyTorch cannot use, or fewer than ranks.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", _gpu_index(environment, torch.cuda.device_count()))
    if torch.version.cuda is not None and num_gpus_of_machine() and environment.get(VISIBLE) not in ("", "-1"):
        raise UserError(
            f"PyTorch {torch.__version__} cannot use this machine's GPUs ({_why_not()}): install a build for the CUDA version of "
            f"the driver, or a newer driver; {VISIBLE}= (empty) trains on the CPUs"
        )
    return CPU


def set_cuda_environment(config: Config, environment: MutableMapping[str, str]) -> None:
    """Set what CUDA and cuBLAS read when they start, unless the user has set it."""
    if config.parallel.tensor > 1:
        # With one queue, collectives of tensor ranks start before the product that hides them.
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if config.training.deterministic:
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or sums depend on which stream was free


def warning_of_unused_gpus() -> str | None:
    """One line if this machine has GPUs and PyTorch was built without CUDA."""
    count = num_gpus_of_machine()
    if count == 0 or torch.version.cuda is not None or torch.version.hip is not None or os.environ.get(VISIBLE) in ("", "-1"):
        return None
    gpus = "the GPU here is" if count == 1 else f"the {count} GPUs here are"
    return f"PyTorch {torch.__version__} was built without CUDA, so {gpus} not used: install a CUDA build"


def num_gpus_of_machine() -> int:
    """GPUs that the NVIDIA driver has found, whether PyTorch can use them or not."""
    return len(list(DEV.glob(GPU_FILES)))


def _gpu_index(environment: Mapping[str, str], num_visible: int) -> int:
    """Which of the GPUs that this process sees is its own."""
    local, num_ranks = int(environment.get("LOCAL_RANK", "0")), num_local_ranks(environment)
    if local < num_visible and num_ranks <= num_visible:
        return local

    # Where Slurm binds GPUs to tasks, each process sees its own ones only, numbered from 0, and no other task sees them.
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    if on_node.isdigit() and max(num_ranks, local + 1) * num_visible <= int(on_node):
        return 0

    shown = f"; {VISIBLE}={environment[VISIBLE]}" if VISIBLE in environment else ""
    raise UserError(
        f"LOCAL_RANK={local} of {max(num_ranks, local + 1)} ranks on this node has no GPU of its own "
        f"({num_visible} visible{shown}): "
        "start one rank for each GPU, or make more of them visible"
    )


def _why_not() -> str:
    """What the driver says, in a few words."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).partition(". ")[0].rstrip(".")
    return "no reason given"
