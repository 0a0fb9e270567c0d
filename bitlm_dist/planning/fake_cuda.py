"""A fake GPU: CUDA tensors have a shape, dtype and device but no data, and CPU tensors are left alone.

Inside :func:`fake_gpu` the project's own code runs as on rank r of N GPUs: it asks torch.cuda and is answered, allocates, moves
modules, meets the other ranks. Mixing devices raises, as on a GPU; nothing is computed there and no memory is needed. Built on
torch's FakeTensorMode and its ``fake`` process group, whose collectives return at once.

What is pretended, all of it here:

- torch.cuda: device properties, streams, events, generators.
- Numbers: a CUDA tensor read by the host is what the host put there, else 1 (True), and zeros where a tensor is copied back.
  ``nonzero`` finds all places, which is the worst case for memory; ``bincount`` finds equal shares.
- Other ranks: objects they send are this rank's own.
- Trials of kernels and compilers, which need numbers: kernels pass, compilers fail. Batches are read by the thread that asks.
- Operators that are a single kernel on CUDA but decompose on fake tensors: RMSNorm.

Do not train in a process that has used this: autograd keeps believing that CUDA is available.
"""

import importlib.util
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from bitlm_dist import compilation
from bitlm_dist.data import ahead
from bitlm_dist.errors import UserError
from bitlm_dist.kernels import trial

GPU = torch.device("cuda", 0)
GUARD = Path(__file__).parent / "fake_cuda.cpp"
GIB = 2**30
waited: list[Callable[[str], None]] = []  # called with the reason whenever the host waits for the GPU
KNOWN = "known_numbers"  # attribute of a fake tensor: what the host put there


class FakeGpuError(UserError):
    """No fake GPU can be made on this machine."""


def load_guard() -> None:
    """Teach a CPU build of PyTorch to differentiate on fake CUDA tensors; compiles 40 lines once for each version of PyTorch.

    Raises:
        FakeGpuError: there is no C++ compiler, or it fails.
    """
    if torch.version.cuda is not None:
        return
    from torch.utils import cpp_extension

    name = "bitlm_fake_cuda_" + metadata.version("torch").replace(".", "_").replace("+", "_")
    try:
        cpp_extension.load(name, [str(GUARD)], extra_cflags=["-O0"], is_python_module=False)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FakeGpuError(f"a fake GPU on a CPU build of PyTorch needs a C++ compiler and ninja: {reason}") from error


@contextmanager
def fake_gpu(world: int, rank: int, capability: tuple[int, int] = (9, 0), memory: int = 80 * GIB) -> Iterator[FakeTensorMode]:
    """While open, this process is rank ``rank`` of ``world``, and torch.cuda shows a GPU.

    Args:
        world, rank: of the job; a process group must not have been built.
        capability: of the GPU; 9.0 is Hopper.
        memory: of the GPU, bytes.

    Yields:
        The mode that makes tensors fake; :class:`~bitlm_dist.planning.step_trace.Tracer` enters it for CUDA tensors.

    Raises:
        FakeGpuError: see :func:`load_guard`; or real GPUs are visible.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.version.cuda is not None and torch.cuda.is_available():
        raise FakeGpuError("a fake GPU needs the real ones hidden: set CUDA_VISIBLE_DEVICES= (empty)")
    load_guard()
    with ExitStack() as stack:
        for target, name, value in _answers(world, capability, memory):
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        stack.callback(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
        # As where there is no GPU: nothing is asked of a driver.
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda self: True)))
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda x: x.cpu().tolist()))
        for name, method in _module_methods(fake).items():
            stack.enter_context(mock.patch.object(nn.Module, name, method))
        yield fake


class _NoOp:
    """A stream, an event or a context that accepts every call."""

    cuda_stream = 0

    def __init__(self, *args: Any, **named: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **named: None

    def synchronize(self) -> None:
        _wait()

    def __enter__(self) -> "_NoOp":
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def _wait(*args: Any) -> None:
    for tell in waited:
        tell("synchronize")


class _AtOnce:
    """A thread whose work is done when it is started, by the thread that starts it: dispatch modes are a thread's own."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], **settings: Any) -> None:
        self._work = partial(target, *args)

    def start(self) -> None:
        self._work()

    def join(self, timeout: float | None = None) -> None:
        pass

    def is_alive(self) -> bool:
        return False


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps its input and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)


class _Generators:
    """One generator, whatever the index."""

    def __getitem__(self, index: int) -> Any:
        return types.SimpleNamespace(get_state=_generator_state, set_state=lambda state: None, device=GPU)


def _generator_state(*args: Any, **named: Any) -> torch.Tensor:
    return torch.zeros(16, dtype=torch.uint8)


def _answers(world: int, capability: tuple[int, int], memory: int) -> Iterator[tuple[Any, str, Any]]:
    """What is asked of torch.cuda and torch.distributed, and the answers."""

    def returns(value: Any) -> Callable[..., Any]:
        return lambda *args, **named: value

    properties = types.SimpleNamespace(
        name="fake GPU", total_memory=memory, major=capability[0], minor=capability[1], multi_processor_count=132
    )
    cudart = types.SimpleNamespace(cudaHostRegister=returns(0), cudaHostUnregister=returns(0))
    values = {
        **{"is_available": True, "is_initialized": True, "is_bf16_supported": True, "is_current_stream_capturing": False},
        **{"device_count": min(world, 8), "current_device": 0, "get_device_capability": capability, "utilization": 0},
        **{"get_device_name": "fake GPU", "get_device_properties": properties, "mem_get_info": (memory, memory)},
        **{"memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0},
        **{
            "initial_seed": 0,
            "memory_stats": Counter[str](),
            "cudart": cudart,
            "current_stream": _NoOp(),
            "default_stream": _NoOp(),
        },
        **dict.fromkeys(("set_device", "manual_seed", "manual_seed_all", "set_rng_state", "empty_cache", "_lazy_init", "init")),
        **dict.fromkeys(("reset_peak_memory_stats", "set_stream")),
    }
    for name, value in values.items():
        yield torch.cuda, name, returns(value)
    for name in ("Stream", "Event", "device"):
        yield torch.cuda, name, _NoOp
    yield torch.cuda, "synchronize", _wait
    yield torch.cuda, "stream", lambda *args: nullcontext()
    yield torch.cuda, "default_generators", _Generators()
    for module in (torch.cuda, torch.cuda.random):
        yield module, "get_rng_state", _generator_state
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        yield torch.cuda.nvtx, name, returns(0)

    def all_gather_object(found: list[Any], value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    yield functional, "rms_norm", lambda x, shape, weight=None, eps=None: _FusedRMSNorm.apply(x, weight)
    yield fake_tensor, "init_gpu_context", returns(None)
    yield trial, "_failure", returns(None)
    yield compilation, "_trial", returns("nothing compiles on fake tensors")
    yield ahead, "Thread", _AtOnce
    yield dist, "all_gather_object", all_gather_object
    yield dist, "broadcast_object_list", returns(None)
    if importlib.util.find_spec("deepspeed"):
        from deepspeed.runtime.zero import utils

        yield utils, "assert_lst_len_same_as_other_ranks", returns(None)
        yield utils, "get_lst_from_rank0", lambda numbers: numbers
    yield DeviceMesh, "from_group", staticmethod(_outside_of_modes(DeviceMesh.from_group))


def _outside_of_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A mesh reads the numbers of its own tensors."""
    from torch.utils._python_dispatch import _disable_current_modes

    def call(*args: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **named)

    return call


def to_gpu(x: torch.Tensor, fake: FakeTensorMode) -> FakeTensor:
    """A tensor as it would be on the GPU; its numbers are kept beside it for whoever copies them back."""
    if isinstance(x, FakeTensor):
        x.fake_device = GPU
        return x
    moved = fake.from_tensor(x)
    moved.fake_device = GPU
    vars(moved).update(vars(x))  # Megatron marks parameters with attributes
    vars(moved)[KNOWN] = x.detach()
    return moved


def _module_methods(fake: FakeTensorMode) -> dict[str, Callable[..., Any]]:
    """Module.to swaps numbers for numbers, which fake tensors refuse: here the device is changed in place."""

    def to(module: nn.Module, *args: Any, **named: Any) -> nn.Module:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **named)  # type: ignore[attr-defined]
        for part in module.modules():
            tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for table in tables:
                for name, x in table.items():
                    if x is not None:
                        table[name] = moved(x, device, dtype)
        return module

    def moved(x: torch.Tensor, device: torch.device | None, dtype: torch.dtype | None) -> torch.Tensor:
        if dtype is not None and x.is_floating_point() and x.dtype != dtype:
            x.data = x.data.to(dtype)
        if device is not None and device.type == "cuda" and x.device.type == "cpu":
            x = to_gpu(x, fake)
            x.detach()  # an operator, so that a mode that counts memory sees it
        return x

    def cast(dtype: torch.dtype) -> Callable[[nn.Module], nn.Module]:
        return lambda module: to(module, dtype)

    def cuda(module: nn.Module, device: Any = None) -> nn.Module:
        return to(module, GPU)

    return {"to": to, "cuda": cuda, "float": cast(torch.float32), "bfloat16": cast(torch.bfloat16)}
