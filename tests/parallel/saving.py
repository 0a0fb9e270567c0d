"""Rank code of test_saving.py: save shards of tensors together, and load them again."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.checkpoint.steps import complete_steps, folder_of
from bitlm_dist.checkpoint.store import SaveError
from bitlm_dist.errors import UserError
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.training.checkpointing import CheckpointManager
from bitlm_dist.training.config import CheckpointConfig
from bitlm_dist.training.weights import load_job_shards


def together(root: str) -> dict[str, Any]:
    """Save three times, where rank 1 fails to write its part of the second.

    Then damage the last checkpoint and resume, with and without a fallback.
    """
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    layout = ParallelLayout(data=world_size, rank=rank)
    tensors = {
        "everywhere": ShardedTensor.from_full(torch.arange(12.0).view(3, 4)),
        "shared": ShardedTensor.from_flat_range(
            torch.Size((world_size, 5)), 5 * rank, torch.full((5,), float(rank))
        ),
    }

    if rank == world_size - 1:
        tensors["last"] = ShardedTensor.from_full(torch.ones(7))
    found: dict[str, Any] = {}
    checkpoints = CheckpointManager(Path(root), CheckpointConfig(), layout)
    plain = tensor_files.write_safetensors

    for step in (1, 2, 3):
        if step == 2 and rank == 1:
            tensor_files.write_safetensors = fail
        try:
            checkpoints.saver.start_save(step, tensors, {"tokens": step})
            checkpoints.saver.finish_save()
        except SaveError as error:
            found["failed"] = step, str(error)
        tensor_files.write_safetensors = plain

    found["steps"] = complete_steps(Path(root))
    dist.barrier()
    if rank == 0:
        file = folder_of(Path(root), 3) / store.rank_file_name(world_size - 1)
        file.write_bytes(file.read_bytes()[:-1])

    dist.barrier()
    try:
        checkpoints.find_resume_point()
    except UserError as error:
        found["refused"] = str(error)

    for tensor in tensors.values():
        tensor.shards[0].tensor.fill_(-1.0)
    load_job_shards(folder_of(Path(root), 1), tensors, layout)
    try:
        # What no rank has a place for is refused by all, whatever each of them holds.
        load_job_shards(folder_of(Path(root), 1), {"shared": tensors["shared"]}, layout)
    except UserError as error:
        found["unwanted"] = str(error)
    found["fallback"] = CheckpointManager(
        Path(root), CheckpointConfig(fallback=True), layout
    ).find_resume_point()
    found["read"] = {name: tensor.shards[0].tensor.clone() for name, tensor in tensors.items()}
    return found


def fail(*arguments: Any) -> None:
    raise OSError("disk on fire")
