"""A fake GPU: CUDA tensors have shape, dtype and device but no data; CPU tensors are unchanged.

Inside :func:`fake_gpu` the project's own code runs as on rank r of N GPUs: it queries torch.cuda,
allocates, moves modules, and communicates with the other ranks. Mixing devices raises, as on a GPU;
nothing is computed on the fake GPU, and its tensors need no memory. This is built on torch's
FakeTensorMode and its ``fake`` process group, whose collectives return at once.

These parts are simulated, all of them in this module:

- torch.cuda: device properties, streams, events, generators.
- Values: if the host reads a CUDA element, it gets the value that it put there, else 1 (True);
  a tensor copied back holds zeros. ``nonzero`` finds all positions, which is the worst case for
  memory; ``bincount`` finds equal counts.
- Other ranks: objects they send equal this rank's own.
- Self-checks of kernels and compilers, which need values: they pass.
- Prefetching: batches are read by the calling thread.
- Code that is a single kernel on CUDA: RMSNorm and compiled regions
  (:mod:`bitlm_dist.planning.gpu_kernels`).

Do not train in a process that has used this: autograd continues to treat CUDA as available.
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
from bitlm_dist.data import prefetch
from bitlm_dist.errors import UserError
from bitlm_dist.kernels import self_check
from bitlm_dist.planning.gpu_kernels import run_fused

GPU = torch.device("cuda", 0)
GUARD_SOURCE = Path(__file__).parent / "fake_cuda.cpp"
GIB = 2**30

# called with the reason whenever the host waits for the GPU
wait_callbacks: list[Callable[[str], None]] = []

# attribute of a fake tensor: the values that the host put there
HOST_VALUE_ATTRIBUTE = "known_numbers"


class FakeGpuError(UserError):
    """No fake GPU can be simulated on this machine."""


def load_guard() -> None:
    """Enable autograd on fake CUDA tensors in a CPU build of PyTorch.

    Compiles 40 lines of C++, once for each version of PyTorch. A no-op in a CUDA build.

    Raises:
        FakeGpuError: there is no C++ compiler, or it fails.
    """
    if torch.version.cuda is not None:
        return

    from torch.utils import cpp_extension

    # cached under its name, and not valid for another version
    name = "bitlm_fake_cuda_" + metadata.version("torch").replace(".", "_").replace("+", "_")
    try:
        cpp_extension.load(name, [str(GUARD_SOURCE)], extra_cflags=["-O0"], is_python_module=False)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FakeGpuError(
            f"a fake GPU on a CPU build of PyTorch needs a C++ compiler and ninja: {reason}"
        ) from error


@contextmanager
def fake_gpu(
    world_size: int, rank: int, capability: tuple[int, int] = (9, 0), memory_bytes: int = 80 * GIB
) -> Iterator[FakeTensorMode]:
    """Run this process as rank ``rank`` of ``world_size`` with a simulated GPU.

    Args:
        world_size: number of ranks. No process group may exist yet.
        rank: global rank.
        capability: compute capability of the GPU; 9.0 is Hopper.
        memory_bytes: memory of the GPU.

    Yields:
        The mode that makes tensors fake; :class:`~bitlm_dist.planning.step_trace.Tracer` enters it
        for CUDA tensors.

    Raises:
        FakeGpuError: real GPUs are visible, or as :func:`load_guard`.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if torch.version.cuda is not None and torch.cuda.is_available():
        raise FakeGpuError(
            "a fake GPU needs the real ones hidden: set CUDA_VISIBLE_DEVICES= (empty)"
        )

    load_guard()
    with ExitStack() as stack:
        for target, name, value in _patches(world_size, capability, memory_bytes):
            stack.enter_context(mock.patch.object(target, name, value, create=True))

        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        stack.callback(lambda: dist.destroy_process_group() if dist.is_initialized() else None)

        # as on a machine without a GPU: no driver is called
        stack.enter_context(
            mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda self: True))
        )

        # parameters are made on the CPU and moved later
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda x: x.cpu().tolist()))
        for name, method in _module_methods(fake).items():
            stack.enter_context(mock.patch.object(nn.Module, name, method))
        yield fake


class _NoOp:
    """Stream, event or context whose methods do nothing."""

    cuda_stream = 0

    def __init__(self, *args: Any, **named: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **named: None

    def synchronize(self) -> None:
        """Report a wait of the host."""
        _notify_wait()

    def __enter__(self) -> "_NoOp":
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def _notify_wait(*args: Any) -> None:
    for callback in wait_callbacks:
        callback("synchronize")


class _SynchronousThread:
    """Thread whose work is done in ``start``, by the caller: dispatch modes are thread-local."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], **settings: Any) -> None:
        self._work = partial(target, *args)

    def start(self) -> None:
        """Do the work."""
        self._work()

    def join(self, timeout: float | None = None) -> None:
        """Return at once."""

    def is_alive(self) -> bool:
        """Return False: the work is done."""
        return False


class _Generators:
    """Sequence that holds the same generator at every index."""

    def __getitem__(self, index: int) -> Any:
        return types.SimpleNamespace(
            get_state=_generator_state, set_state=lambda state: None, device=GPU
        )


def _generator_state(*args: Any, **named: Any) -> torch.Tensor:
    return torch.zeros(16, dtype=torch.uint8)


def _patches(
    world_size: int, capability: tuple[int, int], memory_bytes: int
) -> Iterator[tuple[Any, str, Any]]:
    """Yield the object, attribute and replacement of every patch."""
    for name, value in _cuda_values(world_size, capability, memory_bytes).items():
        yield torch.cuda, name, _returns(value)
    for name in ("Stream", "Event", "device"):
        yield torch.cuda, name, _NoOp
    yield torch.cuda, "synchronize", _notify_wait
    yield torch.cuda, "stream", lambda *args: nullcontext()
    yield torch.cuda, "default_generators", _Generators()

    # torch.cuda.random keeps a name of its own for the function
    for module in (torch.cuda, torch.cuda.random):
        yield module, "get_rng_state", _generator_state
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        yield torch.cuda.nvtx, name, _returns(0)

    yield functional, "rms_norm", partial(run_fused, "rms_norm", functional.rms_norm)
    yield compilation, "_compiled", _fused_region
    yield fake_tensor, "init_gpu_context", _returns(None)

    # self-checks compare values, which fake tensors do not have
    yield self_check, "_failure_reason", _returns(None)
    yield compilation, "_compile_failure_reason", _returns(None)
    yield prefetch, "Thread", _SynchronousThread

    # the fake process group transfers no data
    yield dist, "all_gather_object", _gather_own_object
    yield dist, "broadcast_object_list", _returns(None)
    if importlib.util.find_spec("deepspeed"):
        from deepspeed.runtime.zero import utils

        yield utils, "assert_lst_len_same_as_other_ranks", _returns(None)
        yield utils, "get_lst_from_rank0", lambda numbers: numbers
    yield DeviceMesh, "from_group", staticmethod(_outside_of_modes(DeviceMesh.from_group))


def _cuda_values(world_size: int, capability: tuple[int, int], memory_bytes: int) -> dict[str, Any]:
    """Return values of the functions of torch.cuda, by name."""
    properties = types.SimpleNamespace(
        name="fake GPU",
        total_memory=memory_bytes,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
    )
    cudart = types.SimpleNamespace(cudaHostRegister=_returns(0), cudaHostUnregister=_returns(0))

    return {
        # device
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": min(world_size, 8),
        "current_device": 0,
        "get_device_capability": capability,
        "utilization": 0,
        "get_device_name": "fake GPU",
        "get_device_properties": properties,
        # memory; Tracer counts what is allocated
        "mem_get_info": (memory_bytes, memory_bytes),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "initial_seed": 0,
        "memory_stats": Counter[str](),
        "cudart": cudart,
        "current_stream": _NoOp(),
        "default_stream": _NoOp(),
        # functions without a result
        "set_device": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "set_rng_state": None,
        "empty_cache": None,
        "_lazy_init": None,
        "init": None,
        "reset_peak_memory_stats": None,
        "set_stream": None,
    }


def _fused_region(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Replace the compiler of regions."""
    return partial(run_fused, function.__name__, function)


def _returns(value: Any) -> Callable[..., Any]:
    return lambda *args, **named: value


def _gather_own_object(gathered: list[Any], value: Any, group: Any = None) -> None:
    gathered[:] = [value] * len(gathered)


def _outside_of_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it runs without dispatch modes.

    A device mesh reads the values of its own tensors, which must therefore be real.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    def call(*args: Any, **named: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **named)

    return call


def to_gpu(x: torch.Tensor, fake: FakeTensorMode) -> FakeTensor:
    """Move a tensor to the fake GPU. Its values are kept for a later copy to the host."""
    if isinstance(x, FakeTensor):
        x.fake_device = GPU
        return x

    moved = fake.from_tensor(x)
    moved.fake_device = GPU

    # Megatron marks parameters with attributes
    vars(moved).update(vars(x))
    vars(moved)[HOST_VALUE_ATTRIBUTE] = x.detach()
    return moved


def _module_methods(fake: FakeTensorMode) -> dict[str, Callable[..., Any]]:
    """Replacements of the methods of nn.Module that move or cast it.

    The original methods swap the data of a parameter, which fake tensors refuse. These change the
    device of the tensor in place.
    """

    def to(module: nn.Module, *args: Any, **named: Any) -> nn.Module:
        """Replace :meth:`torch.nn.Module.to`."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **named)  # type: ignore[attr-defined]

        for submodule in module.modules():
            tables: tuple[dict[str, Any], ...] = (submodule._parameters, submodule._buffers)
            for table in tables:
                for name, x in table.items():
                    if x is not None:
                        table[name] = moved(x, device, dtype)

        return module

    def moved(
        x: torch.Tensor, device: torch.device | None, dtype: torch.dtype | None
    ) -> torch.Tensor:
        if dtype is not None and x.is_floating_point() and x.dtype != dtype:
            x.data = x.data.to(dtype)

        if device is not None and device.type == "cuda" and x.device.type == "cpu":
            x = to_gpu(x, fake)
            x.detach()  # any operator, so that the tracer counts the memory

        return x

    def cast(dtype: torch.dtype) -> Callable[[nn.Module], nn.Module]:
        """Replace :meth:`torch.nn.Module.float` and the like."""
        return lambda module: to(module, dtype)

    def cuda(module: nn.Module, device: Any = None) -> nn.Module:
        """Replace :meth:`torch.nn.Module.cuda`."""
        return to(module, GPU)

    return {"to": to, "cuda": cuda, "float": cast(torch.float32), "bfloat16": cast(torch.bfloat16)}
