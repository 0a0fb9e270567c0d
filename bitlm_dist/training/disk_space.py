"""Check before the first step of a run, and at every save, that the disk has room for more."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.config import Config
from bitlm_dist.disks import format_bytes, free_bytes
from bitlm_dist.errors import UserError, log_to_stderr
from bitlm_dist.formatting import plural
from bitlm_dist.training.config import CheckpointConfig
from bitlm_dist.training.optimizer import load_update_rules, param_group

ADVICE = "make room, or set checkpoint.dir to a folder on another disk"
FP32_BYTES = 4
BF16_BYTES = 2


def estimate_checkpoint_bytes(
    config: Config, num_parameters: int, named_parameters: Iterable[tuple[str, Tensor]]
) -> int:
    """Estimate the size of a checkpoint: the weights and their optimizer state.

    Args:
        config: the checked config.
        num_parameters: parameters of the full model.
        named_parameters: this rank's parameters. Their optimizer state per element is taken for
            that of the full model.
    """
    rules = load_update_rules(config.optimizer)
    num_local = 0
    num_state = 0
    for name, tensor in named_parameters:
        rule = rules[param_group(config.optimizer, name, tensor).optimizer]
        state = rule.init_state(torch.empty(tensor.shape, device="meta"))
        num_local += tensor.numel()
        num_state += sum(slot.numel() for slot in state.values())

    # bf16 weights come with their fp32 master weights
    bytes_per_parameter = (
        BF16_BYTES + FP32_BYTES if config.training.precision != "fp32" else FP32_BYTES
    )
    bytes_per_parameter += FP32_BYTES if config.optimizer.ema else 0

    state_bytes = FP32_BYTES * num_state * num_parameters // max(1, num_local)
    return num_parameters * bytes_per_parameter + state_bytes


def check_disk_space(root: Path, checkpoint_bytes: int, config: CheckpointConfig) -> str:
    """Compare the space that the run's checkpoints will need with the free space.

    Args:
        root: the folder of the checkpoints; need not exist.
        checkpoint_bytes: bytes per checkpoint.
        config: how many checkpoints are kept.

    Returns:
        A warning if there is room for the next checkpoint, but not for all that will be kept.
        Empty if there is room for all.

    Raises:
        UserError: there is no room for the next checkpoint.
    """
    free = free_bytes(root.resolve()) + store.stale_bytes(root)
    if free < checkpoint_bytes:
        raise UserError(
            f"{root} has no room for a checkpoint, which takes about "
            f"{format_bytes(checkpoint_bytes)}: {format_bytes(free)} are free: {ADVICE}"
        )
    return _shortage(root, free, checkpoint_bytes, config)


def _shortage(root: Path, free: int, checkpoint_bytes: int, config: CheckpointConfig) -> str:
    """Describe that the checkpoints to be kept need more than is free; empty if they do not."""
    # beside these, one waits for the step that tells its health, while another is being written
    num_kept = config.keep + 1
    num_missing = max(1, num_kept + 1 - len(complete_steps(root)))
    if free >= num_missing * checkpoint_bytes:
        return ""

    return (
        f"{root} has {format_bytes(free)} free, and up to "
        f"{plural(num_missing, 'more checkpoint')} of about {format_bytes(checkpoint_bytes)} each "
        f"will be kept there at once (checkpoint.keep = {config.keep}): {ADVICE}"
    )


class FreeSpaceWatch:
    """Warns that the disk will not take all checkpoints to come: once, until there is room again.

    Args:
        root: the folder of the checkpoints.
        config: how many checkpoints are kept.
    """

    def __init__(self, root: Path, config: CheckpointConfig) -> None:
        self._root = root
        self._config = config
        self._has_warned = False

    def check(self, checkpoint_bytes: int) -> None:
        """Compare the free space with what later checkpoints of this size need."""
        try:
            free = free_bytes(self._root.resolve())
            self.warn(_shortage(self._root, free, checkpoint_bytes, self._config))
        except OSError:  # the next save will tell
            pass

    def warn(self, shortage: str) -> None:
        """Print a shortage; empty: there is none."""
        if shortage and not self._has_warned:
            log_to_stderr(f"warning: {shortage}")
        self._has_warned = bool(shortage)
