"""Whether the disk has room for the checkpoints of a run, known before its first step."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from bitlm_dist.checkpoint import store
from bitlm_dist.config import CheckpointConfig, Config
from bitlm_dist.disks import free_bytes, in_words
from bitlm_dist.errors import UserError
from bitlm_dist.training.optimizer import is_inner_matrix

FP32, BF16 = 4, 2


def checkpoint_bytes(config: Config, parameters: int, named: Iterable[tuple[str, Tensor]]) -> int:
    """Size of a checkpoint: weights, and what the optimizers keep of each.

    Args:
        parameters: of the whole model.
        named: this rank's; the share of Muon's matrices in them stands for that in the whole.
    """
    sizes = [(tensor.numel(), is_inner_matrix(name, tensor)) for name, tensor in named]
    own = sum(size for size, _ in sizes)
    matrices = sum(size for size, inner in sizes if inner and config.optimizer.matrices == "muon")
    each = BF16 + FP32 if config.training.precision == "bf16" else FP32  # bf16: the fp32 copy too
    each += FP32 if config.optimizer.ema else 0
    moments = FP32 * (2 * own - matrices)  # Muon keeps one, AdamW two
    return parameters * each + moments * parameters // max(1, own)


def check_room(root: Path, needed: int, config: CheckpointConfig) -> str:
    """Compare what the run's checkpoints will take with what is free.

    Args:
        root: of the checkpoints; may be missing.
        needed: bytes of one.

    Returns:
        A warning: there is room for the next one, not for all that will be kept. Empty: there is room for all.

    Raises:
        UserError: there is no room for the next one.
    """
    free = free_bytes(root.resolve()) + store.leftover_bytes(root)
    advice = "make room, or set checkpoint.dir to a folder on another disk"
    if free < needed:
        raise UserError(
            f"{root} has no room for a checkpoint, which takes about {in_words(needed)}: {in_words(free)} are free: {advice}"
        )
    kept = config.keep + 1  # one whose next step has not been taken is kept beside them, while the next is written
    missing = max(1, kept + 1 - len(store.complete_steps(root)))
    if free >= missing * needed:
        return ""
    return (
        f"{root} has {in_words(free)} free, and up to {missing} more checkpoints of about {in_words(needed)} each "
        f"will be kept there at once (checkpoint.keep = {config.keep}): {advice}"
    )
