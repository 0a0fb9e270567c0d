"""Retention of checkpoints: the latest healthy ones are kept, and every n-th permanently.

A checkpoint is healthy if loss and gradient norm were finite in its step and in the next one. Only
a healthy checkpoint replaces older ones: one that is bad, or whose next step has not been taken,
causes no deletion.
"""

from collections.abc import Mapping
from pathlib import Path

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint.steps import folder_of


def checkpoints_to_delete(
    health: Mapping[int, bool | None], keep: int, keep_every: int
) -> list[int]:
    """Steps whose checkpoints may be deleted, ascending.

    Args:
        health: Health of every complete checkpoint, by step; None: not known yet.
        keep: Number of latest healthy checkpoints to keep.
        keep_every: Healthy checkpoints of steps divisible by this are permanent; 0: none are.
    """
    healthy = sorted(step for step, good in health.items() if good)
    bad = sorted(step for step, good in health.items() if good is False)

    oldest = healthy[-keep:][0] if healthy else -1
    permanent = {step for step in healthy if keep_every and step % keep_every == 0}
    old = {step for step in health if step < oldest and step not in permanent}

    # The latest bad checkpoint is kept, as evidence of what happened.
    return sorted(old | set(bad[:-1]))


def prune(root: Path, health: dict[int, bool | None], keep: int, keep_every: int) -> None:
    """Delete what :func:`checkpoints_to_delete` names, from the folder and from ``health``."""
    for step in checkpoints_to_delete(health, keep, keep_every):
        store.remove(folder_of(root, step))
        del health[step]
