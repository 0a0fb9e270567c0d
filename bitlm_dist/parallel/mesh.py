"""Process groups of this rank: torch's default group, Megatron's groups, and that of the head."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _coalescing_manager

from bitlm_dist.parallel.cpu import enable_megatron_on_cpu
from bitlm_dist.parallel.device import find_device
from bitlm_dist.parallel.layout import ParallelLayout

# NCCL's own 10 minutes are too short for ranks that wait while rank 0 hashes a large checkpoint
TIMEOUT = timedelta(minutes=30)

# Megatron has no group of the last stage's ranks, nor of an optimizer instance with tensor ranks
_head_group: dist.ProcessGroup | None = None
_head_shard_group: dist.ProcessGroup | None = None
_head_replica_group: dist.ProcessGroup | None = None
_optimizer_and_tensor_group: dist.ProcessGroup | None = None


def device() -> torch.device:
    """The device of this rank; see :func:`~bitlm_dist.parallel.device.find_device`."""
    return find_device(os.environ)


def set_current_device() -> torch.device:
    """Make this rank's device CUDA's current device, on which kernels are launched.

    Returns:
        The device.
    """
    current = device()
    if current.type == "cuda":
        torch.cuda.set_device(current)
    return current


def init_process_groups(layout: ParallelLayout) -> None:
    """Initialize torch's process group and Megatron's groups. Collective.

    A second call is a no-op, so the first must get the job's real layout. The backend is gloo on
    CPUs and NCCL on GPUs. A single rank uses a private in-memory store and opens no port; several
    ranks rendezvous at MASTER_ADDR and MASTER_PORT.
    """
    # Megatron's stand-in for CUDA must be there before Megatron is used
    enable_megatron_on_cpu()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    local_device = set_current_device()
    if not dist.is_initialized():
        # Given its device, NCCL connects at once instead of guessing it at the first barrier.
        settings: dict[str, Any] = (
            {"backend": "nccl", "device_id": local_device}
            if local_device.type == "cuda"
            else {"backend": "gloo"}
        )
        settings["timeout"] = TIMEOUT

        if layout.world_size == 1:
            dist.init_process_group(store=HashStore(), rank=0, world_size=1, **settings)
        else:
            dist.init_process_group(rank=layout.rank, world_size=layout.world_size, **settings)

    assert layout.world_size in (1, dist.get_world_size()), (
        "the process group was built for another layout"
    )

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline
            if layout.virtual_pipeline > 1
            else None,
            context_parallel_size=layout.context,
            num_distributed_optimizer_instances=layout.num_optimizer_instances,
            distributed_timeout_minutes=TIMEOUT // timedelta(minutes=1),
            create_gloo_process_groups=False,
        )
        _build_head_groups(layout)
        _build_optimizer_and_tensor_group(layout)

        # Megatron's generators must be seeded, though dropout is off everywhere and none is used.
        # Seeding them must not reseed the weights.
        with torch.random.fork_rng(devices=[local_device] if local_device.type == "cuda" else []):
            model_parallel_cuda_manual_seed(0)


def destroy_process_groups() -> None:
    """Destroy the process groups at the end of a run; a no-op if there are none.

    A rank that fails must exit without calling it.
    """
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def all_reduce_sum_over_data(value: Tensor) -> Tensor:
    """Sum a tensor over the data-parallel ranks, in place.

    Context-parallel ranks see the same sequences, so only one of them is counted.
    """
    from megatron.core import parallel_state

    dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return value


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    dist.all_reduce(value)
    return value


def all_reduce_sum_over_model(value: Tensor, layout: ParallelLayout) -> Tensor:
    """Sum a tensor over the ranks that hold one replica of the model, in place."""
    if layout.tensor * layout.pipeline > 1:
        dist.all_reduce(value, group=model_group())
    return value


def all_reduce_max(value: Tensor) -> Tensor:
    """Take the elementwise maximum of a tensor over all ranks, in place."""
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def all_reduce_coalesced(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over a group, in place and in one message."""
    if tensors:
        with _coalescing_manager(group):
            for tensor in tensors:
                dist.all_reduce(tensor, group=group)


def broadcast_object(value: Any, layout: ParallelLayout) -> Any:
    """Return rank 0's object on every rank."""
    objects = [value]
    if layout.world_size > 1:
        dist.broadcast_object_list(objects, src=0)
    return objects[0]


def all_gather_object(value: Any, layout: ParallelLayout) -> list[Any]:
    """Return the objects of all ranks, ordered by rank, on every rank."""
    objects: list[Any] = [value] * layout.world_size
    if layout.world_size > 1:
        dist.all_gather_object(objects, value)
    return objects


def replica_group() -> dist.ProcessGroup:
    """Group of the data- and context-parallel ranks, which hold the same weights."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def optimizer_group() -> dist.ProcessGroup:
    """Group of the replicas over which the optimizer of this rank is sharded."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(
        with_context_parallel=True, partial_data_parallel=True
    )
    return group


def model_group() -> dist.ProcessGroup:
    """Group of the tensor- and pipeline-parallel ranks, which hold one replica of the model."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_model_parallel_group()
    return group


def tensor_group() -> dist.ProcessGroup:
    """Group of the tensor-parallel ranks."""
    from megatron.core import parallel_state

    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def optimizer_and_tensor_group() -> dist.ProcessGroup:
    """Group of the tensor-parallel ranks of the replicas in :func:`optimizer_group`.

    The tensor-parallel rank varies fastest.
    """
    from megatron.core import parallel_state

    if _optimizer_and_tensor_group is not None:
        return _optimizer_and_tensor_group
    group: dist.ProcessGroup = parallel_state.get_tensor_and_data_parallel_group(
        with_context_parallel=True
    )
    return group


def group_names() -> dict[str, str]:
    """Purpose of each of this rank's groups, by the name that torch gives the group."""
    from megatron.core import parallel_state

    groups = {
        "tensor": tensor_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "data and context": replica_group(),
        "optimizer": optimizer_group(),
        "optimizer and tensor": optimizer_and_tensor_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "model": model_group(),
        "head": _head_group,
        "head shards": _head_shard_group,
        "copies of the head": _head_replica_group,
        "all": dist.group.WORLD,
    }

    # several axes may share one group; reversed, so that the first of them names it
    return {
        group.group_name: name
        for name, group in reversed(groups.items())
        if isinstance(group, dist.ProcessGroup)
    }


def _build_head_groups(layout: ParallelLayout) -> None:
    """Build the groups of the last stage's ranks. Collective over all ranks, members or not."""
    global _head_group, _head_shard_group, _head_replica_group
    ranks = layout.head_ranks()
    num_shards = len(ranks) // layout.num_head_instances
    _head_group = _head_shard_group = _head_replica_group = None

    if layout.world_size > 1:
        _head_group = _head_shard_group = dist.new_group(ranks, timeout=TIMEOUT)
    if layout.num_head_instances > 1:
        _head_shard_group = _new_groups(
            [ranks[i : i + num_shards] for i in range(0, len(ranks), num_shards)]
        )
        _head_replica_group = _new_groups([ranks[i::num_shards] for i in range(num_shards)])


def _new_groups(rank_lists: Sequence[list[int]]) -> dist.ProcessGroup | None:
    """Build disjoint groups, and return that of this rank. Collective over all ranks."""
    groups = [dist.new_group(ranks, timeout=TIMEOUT) for ranks in rank_lists]
    members = zip(rank_lists, groups, strict=True)
    return next((group for ranks, group in members if dist.get_rank() in ranks), None)


def _build_optimizer_and_tensor_group(layout: ParallelLayout) -> None:
    """Build the groups of optimizer instances with tensor ranks. Collective over all ranks."""
    global _optimizer_and_tensor_group
    _optimizer_and_tensor_group = None
    if layout.tensor == 1 or layout.num_optimizer_instances == 1:
        return

    # the ranks of an instance follow each other
    size = layout.tensor * layout.num_optimizer_shards
    _optimizer_and_tensor_group = _new_groups(
        [list(range(first, first + size)) for first in range(0, layout.world_size, size)]
    )


def head_group() -> dist.ProcessGroup:
    """Group of the last stage's ranks. Must be called by those ranks only."""
    assert _head_group is not None, "one process needs no group"
    return _head_group


def head_device_mesh() -> DeviceMesh:
    """Mesh of the ranks that shard the head: [shards], or [copies of the head, shards]."""
    if _head_replica_group is None:
        return DeviceMesh.from_group(head_group(), device().type)

    assert _head_shard_group is not None
    ranks = torch.tensor(dist.get_process_group_ranks(head_group()))
    return DeviceMesh.from_group(
        [_head_replica_group, _head_shard_group],
        device().type,
        mesh=ranks.view(-1, dist.get_world_size(_head_shard_group)),
        mesh_dim_names=("replicate", "shard"),
    )
