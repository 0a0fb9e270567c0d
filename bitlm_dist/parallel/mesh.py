"""The process group and Megatron's model-parallel groups of this process."""

import os

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from bitlm_dist.parallel.cpu import enable_megatron_on_cpu


def device() -> torch.device:
    """The device this process computes on: its own GPU where CUDA exists, the CPU elsewhere."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def initialize() -> None:
    """Build the process group and Megatron's groups for one process; a second call does nothing.

    gloo carries the CPU, NCCL the GPU. The rendezvous is an in-process store, so no port is opened.
    """
    enable_megatron_on_cpu()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        if device().type == "cuda":
            torch.cuda.set_device(device())
        backend = "nccl" if device().type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        # Dropout is off everywhere, so Megatron's generators are never drawn from; seeding them must not reseed the weights.
        with torch.random.fork_rng():
            model_parallel_cuda_manual_seed(0)
