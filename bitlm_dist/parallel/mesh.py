"""The process group and Megatron's model-parallel groups of this process."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from bitlm_dist.parallel.cpu import enable_megatron_on_cpu
from bitlm_dist.parallel.device import find_device
from bitlm_dist.parallel.layout import Layout

TIMEOUT = timedelta(minutes=30)  # NCCL's own 10 are short for ranks that wait while the first one hashes a large checkpoint
_head_group: dist.ProcessGroup | None = None  # of this process's job; Megatron has no group of this kind


def device() -> torch.device:
    """The device this process computes on, see :func:`~bitlm_dist.parallel.device.find_device`."""
    return find_device(os.environ)


def use_device() -> torch.device:
    """Make :func:`device` what CUDA calls the current one, on which kernels are launched -> it."""
    found = device()
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def initialize(layout: Layout) -> None:
    """Build the process group and Megatron's groups. A second call does nothing: the first must have the job's real layout.

    gloo is used on CPUs, NCCL on GPUs. A single process uses a private in-memory store and opens no port; several rendezvous at
    MASTER_ADDR and MASTER_PORT.
    """
    enable_megatron_on_cpu()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    own = use_device()
    if not dist.is_initialized():
        # With its device named, NCCL connects at once instead of guessing the device at the first barrier.
        settings: dict[str, Any] = {"backend": "nccl", "device_id": own} if own.type == "cuda" else {"backend": "gloo"}
        settings["timeout"] = TIMEOUT
        if layout.world == 1:
            dist.init_process_group(store=HashStore(), rank=0, world_size=1, **settings)
        else:
            dist.init_process_group(rank=layout.rank, world_size=layout.world, **settings)
    assert layout.world in (1, dist.get_world_size()), "the process group was built for another layout"
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
            context_parallel_size=layout.context,
            distributed_timeout_minutes=TIMEOUT // timedelta(minutes=1),
            create_gloo_process_groups=False,
        )
        _build_head_group(layout)
        # Dropout is off everywhere, so Megatron's generators are never drawn from; seeding them must not reseed the weights.
        with torch.random.fork_rng(devices=[own] if own.type == "cuda" else []):
            model_parallel_cuda_manual_seed(0)


def close() -> None:
    """Take the process group down at the end of a run; a second call does nothing. A rank that fails exits without calling it."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def sum_over_data(value: Tensor) -> Tensor:
    """Sum of a tensor over the data-parallel ranks, in place; context-parallel ranks see the same data and count once."""
    from megatron.core import parallel_state

    dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return value


def sum_over_all(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place."""
    dist.all_reduce(value)
    return value


def sum_over_model(value: Tensor, layout: Layout) -> Tensor:
    """Sum of a tensor over the ranks that hold one copy of the model together, in place."""
    if layout.tensor * layout.pipeline > 1:
        dist.all_reduce(value, group=model_group())
    return value


def most_of_all(value: Tensor) -> Tensor:
    """Largest value of a tensor over all processes, in place."""
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def from_first(value: Any, layout: Layout) -> Any:
    """An object of rank 0's, on every process."""
    found = [value]
    if layout.world > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def from_all(value: Any, layout: Layout) -> list[Any]:
    """Every process's object, in the order of ranks, on every process."""
    found: list[Any] = [value] * layout.world
    if layout.world > 1:
        dist.all_gather_object(found, value)
    return found


def data_group() -> dist.ProcessGroup:
    """The ranks that hold the same weights: data- and context-parallel ones."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def model_group() -> dist.ProcessGroup:
    """The ranks that hold one copy of the model together: tensor-parallel ones and stages."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_model_parallel_group()
    return group


def tensor_group() -> dist.ProcessGroup:
    """The tensor-parallel ranks."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def group_names() -> dict[str, str]:
    """What the groups of this process are for, by the names that torch gives them."""
    from megatron.core import parallel_state

    groups = {
        "tensor": tensor_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "data and context": data_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "model": model_group(),
        "head": _head_group,
        "all": dist.group.WORLD,
    }
    return {group.group_name: name for name, group in reversed(groups.items()) if isinstance(group, dist.ProcessGroup)}


def _build_head_group(layout: Layout) -> None:
    """Every process takes part in making a group, also those outside it."""
    global _head_group
    _head_group = dist.new_group(layout.head_ranks(), timeout=TIMEOUT) if layout.world > 1 else None


def head_group() -> dist.ProcessGroup:
    """The ranks of the last stage: tensor-, context- and data-parallel ones. For those ranks alone."""
    assert _head_group is not None, "one process needs no group"
    return _head_group
