"""``training.precision: fp8``: the backbone's matrix products by NVIDIA's Transformer Engine.

Weights, activations and checkpoints are those of bf16. Both factors of a product are scaled by
their current maxima, so no state is carried from step to step. Not yet run on a GPU.
"""

from typing import Any

import torch

from bitlm_dist.config import Config
from bitlm_dist.errors import UserError

MIN_CAPABILITY = (8, 9)  # the first GPUs with fp8 matrix products

# Megatron's options. This recipe has no history of maxima, which checkpoints would have to hold.
# Transformer Engine builds its weights on the GPU.
OPTIONS: dict[str, Any] = {
    "fp8": "hybrid",
    "fp8_recipe": "tensorwise",
    "use_cpu_initialization": False,
}


def check_fp8(device: torch.device) -> None:
    """Check that the device and Transformer Engine can train in fp8.

    Raises:
        UserError: they cannot.
    """
    problem = "training.precision = fp8"
    if device.type != "cuda":
        raise UserError(f"{problem} needs a GPU: use bf16 or fp32")
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{problem}: {name} has no fp8 matrix products: use bf16")

    try:
        import transformer_engine.pytorch  # type: ignore[import-not-found]  # noqa: F401
    except Exception as error:  # built for another CUDA, it raises more than ImportError
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{problem}: Transformer Engine cannot be imported ({reason}): "
            "pip install 'bitlm-dist[te]', or use bf16"
        ) from None


def without_fp8(config: Config) -> Config:
    """The config with bf16 in place of fp8: the same weights, without Transformer Engine."""
    if config.training.precision != "fp8":
        return config
    training = config.training.model_copy(update={"precision": "bf16"})
    return config.model_copy(update={"training": training})


def parallel_linears(precision: str) -> tuple[type[Any], type[Any]]:
    """Megatron's column- and row-parallel linear maps; both kinds have the same weights."""
    if precision == "fp8":
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TERowParallelLinear,
        )

        return TEColumnParallelLinear, TERowParallelLinear

    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    return ColumnParallelLinear, RowParallelLinear
