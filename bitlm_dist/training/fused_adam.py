"""Select an AdamW implementation: on a GPU Transformer Engine's or NVIDIA apex's, else torch's.

All take the same arguments and agree up to rounding. torch keeps one step count per tensor, the
other two keep one per parameter group.
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

# The package `apex` on PyPI is not NVIDIA's; NVIDIA's has the class FusedAdam.
FUSED_ADAM_MODULES = {
    "transformer_engine": "transformer_engine.pytorch.optimizers",
    "apex": "apex.optimizers",
}


def select_adamw(choice: str) -> tuple[str, Callable[..., torch.optim.Optimizer]]:
    """Select the AdamW implementation.

    Args:
        choice: ``optimizer.fused``.

    Returns:
        Its name, and a factory that takes parameter groups and torch's keyword arguments.
    """
    if choice == "auto" and mesh.device().type == "cuda":
        for name, module in FUSED_ADAM_MODULES.items():
            try:
                return name, partial(importlib.import_module(module).FusedAdam, adam_w_mode=True)
            except (ImportError, AttributeError):
                continue
            except Exception as error:
                # one that was built for another CUDA version may raise anything
                log.warning(
                    "AdamW of %s is not used: %s: %s",
                    name,
                    type(error).__name__,
                    " ".join(str(error).split())[:200],
                )

    return "torch", partial(torch.optim.AdamW, fused=True)


@contextmanager
def selected_in_megatron(choice: str) -> Iterator[None]:
    """Context in which Megatron builds its optimizers from the choice of :func:`select_adamw`."""
    from megatron.core import optimizer

    # the flag tells Megatron only torch's or not; it tries the other two in the same order as we do
    previous = optimizer.USING_PYTORCH_OPTIMIZER
    optimizer.USING_PYTORCH_OPTIMIZER = select_adamw(choice)[0] == "torch"
    try:
        yield
    finally:
        optimizer.USING_PYTORCH_OPTIMIZER = previous


def get_or_init_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any]
) -> dict[str, Tensor]:
    """State of a tensor; zero-initialised before the first step.

    Returns:
        The state by slot. ``step`` is a copy if the parameter group keeps the count.
    """
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)

    return (
        state if "step" in state else {**state, "step": torch.tensor(float(group.get("step", 0)))}
    )


def set_step_count(
    optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any], step: Tensor
) -> None:
    """Set the step count of a tensor or, if the group keeps it, of its parameter group."""
    state = optimizer.state[parameter]
    if "step" not in state:
        group["step"] = int(step)
    elif state["step"] is not step:
        state["step"].copy_(step)
