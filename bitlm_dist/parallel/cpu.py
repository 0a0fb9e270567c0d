"""Run Megatron-core on a machine without CUDA.

Megatron-core is written for GPUs: it calls ``torch.cuda.current_device()`` and keeps CUDA generator
states even where nothing else needs a GPU. On a machine without CUDA,
:func:`enable_megatron_on_cpu` replaces the name ``torch`` inside every loaded ``megatron.core``
module by a stand-in that answers these calls for the CPU. torch itself and all other packages are
unchanged. With CUDA the function is a no-op.
"""

import importlib
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bitlm_dist.compilation import no_torch_compile

MEGATRON_VERSION_RANGE = ((0, 16, 1), (0, 20, 0))  # first tested version, first untested one

# Megatron imports these inside functions: they must be loaded before the stand-in is installed.
_MODULES = (
    "megatron.core.optimizer",
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.random",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
    "megatron.core.transformer.attention",
    "megatron.core.transformer.transformer_block",
    "megatron.core.transformer.transformer_layer",
)

# functions to which Megatron passes device="cuda"
_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)


class _NoOp:
    """A stand-in for CUDA streams and events: accepts every call and is its own context manager."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __enter__(self) -> "_NoOp":
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class _Overlay(types.ModuleType):
    """A module with the attributes of ``base``, except for the given names."""

    def __init__(self, base: types.ModuleType, **names: Any) -> None:
        super().__init__(base.__name__)
        self.__dict__["_base"] = base
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        """Call the factory with CUDA devices replaced by the CPU."""
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = torch.device("cpu")
        return factory(*args, **kwargs)

    return call


def _torch_stand_in() -> types.ModuleType:
    # Megatron takes these from torch.cuda and from torch.cuda.random
    generator = {
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "manual_seed": torch.manual_seed,
    }
    cuda = _Overlay(
        torch.cuda,
        current_device=lambda: torch.device("cpu"),
        synchronize=lambda *args: None,
        current_stream=lambda *args: _NoOp(),
        stream=_NoOp,
        Stream=_NoOp,
        Event=_NoOp,
        random=_Overlay(torch.cuda.random, **generator),
        **generator,
    )

    return _Overlay(
        torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    )


def _check_version() -> None:
    installed = importlib.metadata.version("megatron-core")
    version = tuple(
        int("".join(filter(str.isdigit, part)) or 0) for part in installed.split(".")[:3]
    )

    first, end = MEGATRON_VERSION_RANGE
    if not first <= version < end:
        tested = ".".join(map(str, first)) + " to below " + ".".join(map(str, end))
        raise ValueError(
            f"megatron-core {installed} is installed; its CPU support here is tested with "
            f"{tested}: install one of these"
        )


def enable_megatron_on_cpu() -> bool:
    """Make megatron-core usable without CUDA.

    Returns:
        True if the stand-in was installed; False if CUDA is available.

    Raises:
        ValueError: the installed megatron-core is outside the tested range; private names are
            replaced here.
    """
    if torch.cuda.is_available():
        return False
    _check_version()

    # Decorating Megatron's fused functions, which nothing calls on a CPU, would load the compiler.
    with no_torch_compile():
        for name in _MODULES:
            importlib.import_module(name)

    # modules look `torch` up in their own globals, so replacing it there reaches all their calls
    stand_in = _torch_stand_in()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]

    # this one indexes CUDA's default generators, which the stand-in does not have
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    vars(random)["_set_cuda_rng_state"] = lambda state, *args, **kwargs: torch.set_rng_state(state)
    return True


@contextmanager
def tensors_named_as_on_cuda() -> Iterator[None]:
    """Context in which ``Tensor.type()`` names CPU tensors as CUDA tensors. A no-op with CUDA.

    Megatron's optimizers sort parameters by that name.
    """
    if torch.cuda.is_available():
        yield
        return

    original_type = torch.Tensor.type

    def named(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """``Tensor.type`` with CUDA's names."""
        found = original_type(tensor, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    # torch.Tensor inherits `type` from its base, so deleting ours restores it
    setattr(torch.Tensor, "type", named)  # noqa: B010
    try:
        yield
    finally:
        del torch.Tensor.type
