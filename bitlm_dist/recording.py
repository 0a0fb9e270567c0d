"""Values that any code on any rank records in a training step, without a wait for the device.

The trainer reduces them over all ranks and writes them to metrics.jsonl
(:mod:`bitlm_dist.training.recorder`).
"""

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "max"]
Key = tuple[str, Reduction]

# by key, [2]: the sum or maximum of what was recorded since the last take, and the number of calls
_records: dict[Key, Tensor] = {}


def record(name: str, value: Tensor, reduce: Reduction = "mean") -> None:
    """Record a value of this step. Some rank must do so in the first step, too.

    Args:
        name: its key in metrics.jsonl.
        value: [], on the device of this rank.
        reduce: how the values of all calls and ranks become one.
    """
    value = value.detach().double()
    new = torch.stack([value, torch.ones_like(value)])
    old = _records.get((name, reduce))
    if old is not None:
        number = old[1] + 1
        total = torch.maximum(old[0], value) if reduce == "max" else old[0] + value
        new = torch.stack([total, number])
    _records[name, reduce] = new


def take_records() -> dict[Key, Tensor]:
    """Return what was recorded since the last call."""
    taken = dict(_records)
    _records.clear()
    return taken
