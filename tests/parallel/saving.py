"""What the ranks of test_saving.py do: save shares of tensors together, and find them again."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.checkpoint.store import SaveError
from bitlm_dist.config import CheckpointConfig
from bitlm_dist.errors import UserError
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.parallel.sliced import Sliced
from bitlm_dist.training.checkpointing import Checkpoints


def together(root: str) -> dict[str, Any]:
    """Three saves, of which rank 1 cannot write its part of the second; then damage, with and without a fallback."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    layout = Layout(data=world, rank=rank)
    tensors = {
        "everywhere": Sliced.whole(torch.arange(12.0).view(3, 4)),
        "shared": Sliced.of_range(torch.Size((world, 5)), 5 * rank, torch.full((5,), float(rank))),
    }
    if rank == world - 1:
        tensors["last"] = Sliced.whole(torch.ones(7))
    found: dict[str, Any] = {}
    checkpoints = Checkpoints(Path(root), CheckpointConfig(), layout)
    plain = tensor_files.write
    for step in (1, 2, 3):
        if step == 2 and rank == 1:
            tensor_files.write = fail
        try:
            checkpoints.saver.begin(step, tensors, {"tokens": step})
            checkpoints.saver.finish()
        except SaveError as error:
            found["failed"] = step, str(error)
        tensor_files.write = plain
    found["steps"] = store.complete_steps(Path(root))
    dist.barrier()
    if rank == 0:
        file = store.folder_of(Path(root), 3) / store.file_of(world - 1)
        file.write_bytes(file.read_bytes()[:-1])
    dist.barrier()
    try:
        checkpoints.find()
    except UserError as error:
        found["refused"] = str(error)
    for part in tensors.values():
        part.slices[0].tensor.fill_(-1.0)
    tensor_files.read(store.folder_of(Path(root), 1), tensors)
    found["fallback"] = Checkpoints(Path(root), CheckpointConfig(fallback=True), layout).find()
    found["read"] = {name: part.slices[0].tensor.clone() for name, part in tensors.items()}
    return found


def fail(*arguments: Any) -> None:
    raise OSError("disk on fire")
