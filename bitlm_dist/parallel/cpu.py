"""Megatron-core on a machine without CUDA.

Megatron-core is written for GPUs: it asks for ``torch.cuda.current_device()`` and keeps CUDA generator states even where
nothing else needs a GPU. On a machine without CUDA, :func:`enable_megatron_on_cpu` replaces the name ``torch`` inside every
loaded ``megatron.core`` module by a stand-in that answers these questions for the CPU. torch itself, and every other package,
stays untouched; where CUDA exists the function does nothing.
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

MEGATRON_TESTED = ((0, 16, 1), (0, 20, 0))  # first tested version, first version not tested

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
_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "rand", "randn", "tensor", "zeros", "zeros_like")


class _NoOp:
    """Stands for a CUDA stream or event: accepts every call and is its own context manager."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __enter__(self) -> "_NoOp":
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class _Overlay(types.ModuleType):
    """A module that shows ``base`` except for the given names."""

    def __init__(self, base: types.ModuleType, **names: Any) -> None:
        super().__init__(base.__name__)
        self.__dict__["_base"] = base
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = torch.device("cpu")
        return factory(*args, **kwargs)

    return call


def _torch_stand_in() -> types.ModuleType:
    generator = {"get_rng_state": lambda *a, **k: torch.get_rng_state(), "manual_seed": torch.manual_seed}
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
    return _Overlay(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


def _check_version() -> None:
    found = importlib.metadata.version("megatron-core")
    number = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split(".")[:3])
    first, end = MEGATRON_TESTED
    if not first <= number < end:
        tested = ".".join(map(str, first)) + " to below " + ".".join(map(str, end))
        raise ValueError(f"megatron-core {found} is installed; its CPU support here is tested with {tested}: install one of these")


def enable_megatron_on_cpu() -> bool:
    """Make megatron-core usable without CUDA; returns whether anything had to be done.

    Raises:
        ValueError: the installed megatron-core is outside the tested range (private names are replaced here).
    """
    if torch.cuda.is_available():
        return False
    _check_version()
    # Megatron's fused functions, which nothing calls on a CPU, would load the compiler when they are decorated.
    with no_torch_compile():
        for name in _MODULES:
            importlib.import_module(name)

    stand_in = _torch_stand_in()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    vars(random)["_set_cuda_rng_state"] = lambda state, *args, **kwargs: torch.set_rng_state(state)
    return True


@contextmanager
def tensors_named_as_on_cuda() -> Iterator[None]:
    """While open, ``Tensor.type()`` names a CPU tensor as a CUDA one: Megatron's optimizers sort tensors by that name.

    Where CUDA exists nothing changes.
    """
    if torch.cuda.is_available():
        yield
        return
    plain = torch.Tensor.type

    def named(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = plain(tensor, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    setattr(torch.Tensor, "type", named)  # noqa: B010 - the class inherits it, so removing ours restores it
    try:
        yield
    finally:
        del torch.Tensor.type
