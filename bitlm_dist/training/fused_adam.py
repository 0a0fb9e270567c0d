"""The AdamW implementation that is at hand: Transformer Engine's or NVIDIA apex's where one is installed on a GPU, else torch's.

All take the same arguments and give the same numbers up to rounding. torch counts steps a tensor, the other two a parameter group.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitlm_dist.parallel import mesh

log = logging.getLogger(__name__)
# The package `apex` of the index is not NVIDIA's: only what has this class is.
FUSED = {"transformer_engine": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}


def find(choice: str) -> tuple[str, Callable[..., torch.optim.Optimizer]]:
    """-> name of the implementation, and what makes an optimizer of parameter groups and torch's arguments.

    Args:
        choice: ``optimizer.fused``.
    """
    if choice == "auto" and mesh.device().type == "cuda":
        for name, module in FUSED.items():
            try:
                return name, partial(importlib.import_module(module).FusedAdam, adam_w_mode=True)
            except (ImportError, AttributeError):
                continue
            except Exception as error:  # one that was built for another CUDA fails in ways of its own
                log.warning("AdamW of %s is not used: %s: %s", name, type(error).__name__, " ".join(str(error).split())[:200])
    return "torch", partial(torch.optim.AdamW, fused=True)


@contextmanager
def chosen_in_megatron(choice: str) -> Iterator[None]:
    """While open, Megatron makes its optimizers from the implementation that :func:`find` names; its own order is that too."""
    from megatron.core import optimizer

    found = optimizer.USING_PYTORCH_OPTIMIZER
    optimizer.USING_PYTORCH_OPTIMIZER = find(choice)[0] == "torch"
    try:
        yield
    finally:
        optimizer.USING_PYTORCH_OPTIMIZER = found


def fill(optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state of a tensor, made if no step has been taken -> its slots; ``step`` is a copy where the group counts it."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return state if "step" in state else {**state, "step": torch.tensor(float(group.get("step", 0)))}


def set_step(optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any], step: Tensor) -> None:
    """Take over a saved step count."""
    state = optimizer.state[parameter]
    if "step" not in state:
        group["step"] = int(step)
    elif state["step"] is not step:
        state["step"].copy_(step)
