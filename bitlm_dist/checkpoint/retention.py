"""Which checkpoints are kept: the newest healthy ones, and every n-th for ever.

A checkpoint is healthy if loss and gradient norm were finite in its step and in the next one. Only a healthy one replaces older
ones: one whose next step has not been taken, or that turned out bad, removes nothing.
"""

from collections.abc import Mapping
from pathlib import Path

from bitlm_dist.checkpoint import store


def superfluous(health: Mapping[int, bool | None], keep: int, keep_every: int) -> list[int]:
    """Steps whose checkpoints may go.

    Args:
        health: of every complete checkpoint by step; None: not known yet.
        keep: newest healthy ones to keep.
        keep_every: healthy ones of steps divisible by this stay for ever; 0: none.
    """
    healthy = sorted(step for step, good in health.items() if good)
    bad = sorted(step for step, good in health.items() if good is False)
    oldest = healthy[-keep:][0] if healthy else -1
    for_ever = {step for step in healthy if keep_every and step % keep_every == 0}
    old = {step for step in health if step < oldest and step not in for_ever}
    return sorted(old | set(bad[:-1]))  # of bad ones the newest tells what happened


def tidy(root: Path, health: dict[int, bool | None], keep: int, keep_every: int) -> None:
    """Remove the checkpoints that :func:`superfluous` names, from the folder and from ``health``."""
    for step in superfluous(health, keep, keep_every):
        store.remove(store.folder_of(root, step))
        del health[step]
