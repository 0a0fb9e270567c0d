"""Operator-level trace of a training step on a GPU: memory and its origins, FLOPs, collectives,
waits, transfers.

:class:`Tracer` is a dispatch mode: it sees every operator of forward, backward, optimizer and
communication. Operators on CUDA tensors run on fake tensors
(:mod:`bitlm_dist.planning.fake_cuda`), operators on CPU tensors run normally.
"""

import functools
import gc
import math
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from bitlm_dist import kernels
from bitlm_dist.planning.fake_cuda import GPU, HOST_VALUE_ATTRIBUTE, to_gpu, wait_callbacks
from bitlm_dist.planning.gpu_kernels import fused_kernel_callbacks, operator_bytes, tensor_bytes

aten = torch.ops.aten

# index of the argument that holds the queries in the backward operator; the keys follow
BACKWARD_QUERY_INDEX = {
    "block_causal_attention": 2,
    "flash_attention_4": 1,
}
PIN_OPERATORS = (aten.pin_memory, aten._pin_memory)
ALLOCATOR_GRANULARITY = 512  # bytes; of torch's caching allocator
MIN_TRACKED_BYTES = 2**20  # smaller tensors are counted as one origin

# libraries whose source lines are named, except for the wrappers in these folders
LIBRARIES = {"megatron", "deepspeed"}
WRAPPERS = {"accelerator", "comm", "utils"}
PLANNING_FOLDER = Path(__file__).parent
KERNELS_FOLDER = Path(kernels.__file__).parent


def _counters() -> dict[str, Counter[Any]]:
    return defaultdict(Counter)


@dataclass(frozen=True)
class Collective:
    """Collective or point-to-point message.

    Attributes:
        operator: its name.
        group: name of the process group.
        num_bytes: bytes that this rank sends or receives, whichever is larger.
    """

    operator: str
    group: str
    num_bytes: int


@dataclass(frozen=True)
class SourceLine:
    """Line of source code that waits or transfers, and why."""

    file: str  # folder/file.py
    function: str
    line: int
    reason: str


@dataclass(frozen=True)
class KernelSource:
    """Where a kernel was launched.

    Attributes:
        module: name of the module, without layer numbers.
        operator: the operator, or the region.
        is_backward: launched in the backward pass, where activations are recomputed, too.
    """

    module: str
    operator: str
    is_backward: bool


@dataclass
class StepTrace:
    """Recorded trace. The keys of most mappings are the phases: ``build``, ``step 0``, …

    Attributes:
        parameter_shapes: shape of every parameter of the rank, by name.
        buffer_bytes: bytes of every buffer, by name.
        static_bytes: allocated bytes at the end of a phase.
        peak_bytes: peak of the allocated bytes in a phase.
        origins: allocated bytes at the peak, by module and operator.
        flops: FLOPs of matrix products and attention.
        num_operators: number of operators on CUDA tensors.
        num_kernels: number of kernels, by source; see :mod:`bitlm_dist.planning.gpu_kernels`.
        hbm_bytes: bytes that these kernels read and write, by source.
        collectives: in the order of their calls.
        waits: number of times the host waits for the GPU, by source line.
        transfers: bytes between host and device, by source line; the reason names the direction.
    """

    parameter_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    buffer_bytes: dict[str, int] = field(default_factory=dict)
    static_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: Counter[str] = field(default_factory=Counter)
    origins: dict[str, Counter[str]] = field(default_factory=dict)
    flops: Counter[str] = field(default_factory=Counter)
    num_operators: Counter[str] = field(default_factory=Counter)
    num_kernels: dict[str, Counter[KernelSource]] = field(default_factory=_counters)
    hbm_bytes: dict[str, Counter[KernelSource]] = field(default_factory=_counters)
    collectives: dict[str, list[Collective]] = field(default_factory=lambda: defaultdict(list))
    waits: dict[str, Counter[SourceLine]] = field(default_factory=_counters)
    transfers: dict[str, Counter[SourceLine]] = field(default_factory=_counters)


class Tracer(TorchDispatchMode):
    """Dispatch mode that traces all operators on CUDA tensors; a context manager.

    Args:
        fake: the mode that :func:`~bitlm_dist.planning.fake_cuda.fake_gpu` yielded.
        group_names: returns the readable names of process groups by torch's own names, see
            :func:`bitlm_dist.parallel.mesh.group_names`; called for each collective, as groups may
            be created at any time.
        build_fake: make CPU tensors fake in the first phase, too; so a model of any size needs no
            memory.
    """

    def __init__(
        self, fake: FakeTensorMode, group_names: Callable[[], Mapping[str, str]], build_fake: bool
    ) -> None:
        super().__init__()
        self._all_fake = build_fake
        self.trace = StepTrace()
        self.phase = "build"
        self._fake = fake
        self._group_names = group_names
        self._module_tracker = _ModuleTracker()

        # reference, bytes and origin of every storage on the GPU, by its address
        self._live_storages: dict[int, tuple[Any, int, str]] = {}
        self._pinned_storages: set[int] = set()
        self._allocated_bytes = 0
        self._bytes_by_origin = Counter[str]()

        # module and operator at work
        self._origin = ""
        self._operator = ""

        self._handlers: dict[Any, Callable[..., Any]] = {
            aten._local_scalar_dense: self._item,
            aten.nonzero: self._nonzero,
            aten.index: self._index,
            aten.bincount: self._bincount,
            aten._to_copy: self._to_copy,
            aten.copy_: self._copy,
        }

    def start_phase(self, phase: str) -> None:
        """Start a phase, which ends the current one."""
        self._all_fake = False
        self._module_tracker.clear()

        # otherwise the memory of reference cycles counts until some later collection
        gc.collect()
        self.trace.static_bytes[self.phase] = self._allocated_bytes

        self.phase = phase
        self.trace.peak_bytes[phase] = self._allocated_bytes
        self.trace.origins[phase] = self._bytes_by_origin.copy()

    def __enter__(self) -> "Tracer":
        self._module_tracker.__enter__()
        wait_callbacks.append(self._record_wait)
        fused_kernel_callbacks.append(self._record_fused_kernel)
        self._resize_patch = mock.patch.object(
            torch.UntypedStorage, "resize_", self._counting_resize()
        )
        self._resize_patch.start()

        # so that torch.tensor(…, device="cuda") copies from a CPU tensor, which the mode sees
        self._only_lift_cpu = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch._C._set_only_lift_cpu_tensors(self._only_lift_cpu)
        self._resize_patch.stop()
        wait_callbacks.remove(self._record_wait)
        fused_kernel_callbacks.remove(self._record_fused_kernel)
        self._module_tracker.__exit__(*exc)

        # the last phase ends, too
        self.trace.static_bytes[self.phase] = self._allocated_bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator on fake tensors, and record it."""
        kwargs = kwargs or {}

        # operators that are not traced
        if func.namespace == "c10d":
            return self._record_collective(func, args)
        if func._overloadpacket in PIN_OPERATORS:
            return self._mark_pinned(args[0].clone())
        if not self._all_fake and not _on_gpu(args, kwargs):
            return func(*args, **kwargs)

        # in inference mode composite operators arrive undecomposed
        if _is_composite(func):
            # enter only the mode itself: hooks and callbacks are still installed
            super().__enter__()
            try:
                return func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)

        self._origin = self._module_tracker.current_name()
        self._operator = func.__name__
        self.trace.num_operators[self.phase] += 1

        packet = func._overloadpacket
        handler = self._handlers.get(packet)
        out = NotImplemented if handler is None else handler(func, args, kwargs)
        if out is NotImplemented:
            out = self._run(func, args, kwargs)

        if packet in flop_registry:
            self.trace.flops[self.phase] += flop_registry[packet](*args, **kwargs, out_val=out)
        elif func.namespace == "bitlm":
            self.trace.flops[self.phase] += custom_op_flops(func.__name__, args)

        num_bytes = operator_bytes(func, args, kwargs, out)
        if num_bytes is not None:
            self._record_kernel(num_bytes)

        for x in tree_iter(out):
            self.track_storage(x)
        return out

    def _record_kernel(self, num_bytes: int) -> None:
        is_backward = torch._C._current_autograd_node() is not None
        source = KernelSource(self._origin, self._operator, is_backward)
        self.trace.num_kernels[self.phase][source] += 1
        self.trace.hbm_bytes[self.phase][source] += num_bytes

    def _record_fused_kernel(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        """Record a kernel that stands for several operators."""
        self._origin = self._module_tracker.current_name()
        self._operator = name
        self.trace.num_operators[self.phase] += 1
        self._record_kernel(sum(map(tensor_bytes, (*read, *written))))

        for x in written:
            self.track_storage(x)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self._fake:
            return func(*args, **kwargs)

    # --- memory -----------------------------------------------------------------------------------

    def track_storage(self, x: Any) -> None:
        """Count the storage of a CUDA tensor until it is freed."""
        if not isinstance(x, FakeTensor) or x.device.type != "cuda":
            return

        # views share a storage, which counts once
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._live_storages:
            return

        size = _rounded_bytes(storage.nbytes())
        origin = (
            f"{self._origin}: {self._operator}" if size >= MIN_TRACKED_BYTES else "small tensors"
        )
        self._live_storages[key] = (
            weakref.ref(storage, lambda _: self._untrack_storage(key)),
            size,
            origin,
        )

        self._add_bytes(size, origin)

    def _untrack_storage(self, key: int) -> None:
        _, size, origin = self._live_storages.pop(key)
        self._add_bytes(-size, origin)

    def _on_resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Adjust the size of a tracked storage: FSDP2 frees gathered weights by resizing to 0."""
        if storage._cdata in self._live_storages:
            reference, old, origin = self._live_storages[storage._cdata]
            self._live_storages[storage._cdata] = reference, _rounded_bytes(size), origin
            self._add_bytes(_rounded_bytes(size) - old, origin)

    def _counting_resize(self) -> Callable[[torch.UntypedStorage, int], torch.UntypedStorage]:
        """Replacement of ``UntypedStorage.resize_``, which is not a dispatched operator."""
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            self._on_resize(storage, size)
            return resize(storage, size)

        return resize_and_count

    def _add_bytes(self, size: int, origin: str) -> None:
        # the counter at the peak belongs to the trace now
        if self.trace.origins.get(self.phase) is self._bytes_by_origin:
            self._bytes_by_origin = self._bytes_by_origin.copy()

        self._allocated_bytes += size
        self._bytes_by_origin[origin] += size

        if self._allocated_bytes > self.trace.peak_bytes[self.phase]:
            self.trace.peak_bytes[self.phase] = self._allocated_bytes
            self.trace.origins[self.phase] = self._bytes_by_origin  # copied before the next change

    # --- values -----------------------------------------------------------------------------------

    def _item(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the value that the host put there, else 1, which is safe to divide by."""
        x = args[0]
        self._record_wait("item")

        host_value = vars(x).get(HOST_VALUE_ATTRIBUTE)
        if (
            host_value is not None
            and host_value.numel() == 1
            and not isinstance(host_value, FakeTensor)
        ):
            return host_value.item()

        return True if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1

    def _worst_case_nonzero(self, mask: Tensor) -> Tensor:
        """Result of nonzero(mask), as if every element were true."""
        self._record_wait("nonzero")

        with self._fake:
            return torch.empty_strided(
                (mask.numel(), mask.dim()), (1, mask.numel()), dtype=torch.int64, device=GPU
            )

    def _nonzero(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._worst_case_nonzero(args[0])

    def _index(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Index by masks as by the positions that nonzero finds."""
        chosen: list[Any] = []
        for index in args[1]:
            is_mask = index is not None and index.dtype == torch.bool
            chosen += self._worst_case_nonzero(index).unbind(1) if is_mask else [index]

        return self._run(func, (args[0], chosen), kwargs)

    def _bincount(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Spread the counts equally over the bins."""
        self._record_wait("bincount")
        bins = kwargs.get("minlength", args[2] if len(args) > 2 else 1)
        per_bin, rest = divmod(args[0].numel(), bins)

        with _disable_current_modes():
            counts = torch.tensor([per_bin + (i < rest) for i in range(bins)])

        return to_gpu(counts, self._fake)

    # --- between host and device ------------------------------------------------------------------

    def _to_copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0]
        device = kwargs.get("device")
        target = x.device if device is None else torch.device(device)

        if x.device.type == "cuda" and target.type == "cpu":
            return self._to_host(x, kwargs)

        if x.device.type == "cpu" and target.type == "cuda":
            self._to_device(x, kwargs.get("non_blocking", False))
            dtype = kwargs.get("dtype") or x.dtype
            return to_gpu(
                torch.empty_like(x, dtype=dtype)
                if isinstance(x, FakeTensor)
                else x.to(dtype, copy=True),
                self._fake,
            )

        return NotImplemented

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        target = args[0]
        source = args[1]
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))

        # a copy into pageable memory blocks in any case
        if target.device.type == "cpu" and source.device.type == "cuda":
            self._record_transfer("to the host", source)
            if blocking or not self._is_pinned(target):
                self._record_wait("copy to the host")
            return (
                target.copy_(self._host_values(source))
                if not isinstance(target, FakeTensor)
                else target
            )

        if target.device.type == "cuda" and source.device.type == "cpu":
            self._to_device(source, not blocking)

        return NotImplemented

    def _to_host(self, x: Tensor, kwargs: Any) -> Tensor:
        self._record_transfer("to the host", x)
        values = self._host_values(x).to(kwargs.get("dtype") or x.dtype)

        # torch allocates pinned memory for non-blocking copies
        if kwargs.get("non_blocking", False):
            return self._mark_pinned(values)

        self._record_wait("copy to the host")
        return values

    def _host_values(self, x: Tensor) -> Tensor:
        """Real values for a fake tensor: those that the host put there, else zeros."""
        host_value: Tensor | None = vars(x).get(HOST_VALUE_ATTRIBUTE)

        with _disable_current_modes():
            if (
                host_value is not None
                and host_value.shape == x.shape
                and not isinstance(host_value, FakeTensor)
            ):
                return host_value.clone()

            return torch.zeros(x.shape, dtype=x.dtype)

    def _to_device(self, x: Tensor, non_blocking: bool) -> None:
        self._record_transfer("to the device", x)
        if not (non_blocking and self._is_pinned(x)):
            self._record_wait("copy of pageable memory to the device")

    def _mark_pinned(self, x: Tensor) -> Tensor:
        """Mark the storage of a host tensor as pinned; its views share the mark."""
        storage = x.untyped_storage()
        self._pinned_storages.add(storage._cdata)

        # the address may be reused
        weakref.finalize(storage, self._pinned_storages.discard, storage._cdata)
        return x

    def _is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self._pinned_storages

    def _record_transfer(self, direction: str, x: Tensor) -> None:
        self.trace.transfers[self.phase][_current_source_line(direction)] += (
            x.numel() * x.element_size()
        )

    def _record_wait(self, reason: str) -> None:
        self.trace.waits[self.phase][_current_source_line(reason)] += 1

    # --- other ranks ------------------------------------------------------------------------------

    def _record_collective(self, func: Any, args: Any) -> Any:
        name = func.__name__.split(".")[0].strip("_")

        # inputs and outputs are separate arguments
        lists = [[x for x in tree_iter(argument) if isinstance(x, Tensor)] for argument in args]
        if name != "barrier" and any(x.device.type != "cuda" for tensors in lists for x in tensors):
            raise RuntimeError(f"{name}: NCCL takes no tensor on the CPU")

        group = next(
            (group_name for x in tree_iter(args) if (group_name := self._group_name(x))), "?"
        )
        size = max(
            (sum(x.numel() * x.element_size() for x in tensors) for tensors in lists), default=0
        )
        self.trace.collectives[self.phase].append(Collective(name, group, size))

        # nothing is sent, so the work is complete at once
        work = torch._C._distributed_c10d.FakeWork().boxed()  # type: ignore[attr-defined]
        return (args[0], work) if len(func._schema.returns) == 2 else work

    def _group_name(self, x: Any) -> str:
        if not isinstance(x, torch.ScriptObject):
            return ""

        try:
            name = dist.ProcessGroup.unbox(x).group_name
        except RuntimeError:  # another kind of object
            return ""

        return self._group_names().get(name, f"group {name}")


@functools.cache
def _is_composite(func: Any) -> bool:
    """True if an operator is defined by others, and so has no kernel of its own on any device."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return func.namespace == "aten" and has_kernel(func.name(), "CompositeImplicitAutograd")


def _on_gpu(args: Any, kwargs: Any) -> bool:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        return True

    # fake CPU tensors belong to the build phase and are traced like CUDA tensors
    return any(
        isinstance(x, Tensor) and (x.device.type == "cuda" or isinstance(x, FakeTensor))
        for x in tree_iter((args, kwargs))
    )


def _current_source_line(reason: str) -> SourceLine:
    """Innermost running line of the project, Megatron-core or DeepSpeed.

    In a backward pass there may be none, as autograd calls the operators itself.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        file = Path(code.co_filename)
        is_project_file = file.parent != PLANNING_FOLDER and (
            file.is_relative_to(PLANNING_FOLDER.parent) or file.parent == KERNELS_FOLDER
        )
        if is_project_file or (LIBRARIES & set(file.parts) and file.parent.name not in WRAPPERS):
            return SourceLine(
                f"{file.parent.name}/{file.name}", code.co_name, frame.f_lineno, reason
            )

        frame = frame.f_back  # type: ignore[assignment]

    return SourceLine("backward", "", 0, reason)


class _ModuleTracker:
    """Tracks the running module; in a backward pass, the module whose forward created the node.

    torch's own ModuleTracker does the same, but keeps every autograd graph alive until it exits.
    """

    def __init__(self) -> None:
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._stack: list[str] = []
        self._by_node: dict[int, str] = {}  # by sequence number of the autograd node
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        self._hooks = [
            register_module_forward_pre_hook(self._push),
            register_module_forward_hook(self._pop, always_call=True),
        ]

    def __exit__(self, *exc: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def current_name(self) -> str:
        """Name of the running module without layer numbers. Must be called once per operator."""
        node = torch._C._current_autograd_node()
        if node is not None and not self._stack:
            return self._by_node.get(node._sequence_nr(), "backward")

        name = self._stack[-1] if self._stack else "outside of modules"

        # if this operator created a node, it was the last one
        last: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self._by_node.setdefault(last - 1, name)
        return name

    def _pop(self, module: nn.Module, inputs: Any, output: Any) -> None:
        assert self._stack.pop() == self._names[module]

    def clear(self) -> None:
        """Forget all autograd nodes; no backward pass of theirs may follow."""
        self._by_node.clear()

    def _push(self, module: nn.Module, inputs: Any) -> None:
        # the first module that runs is the outermost one, and names all others
        if module not in self._names:
            for name, submodule in module.named_modules(prefix=type(module).__name__):
                self._names.setdefault(
                    submodule, ".".join(word for word in name.split(".") if not word.isdigit())
                )

        self._stack.append(self._names[module])


def _rounded_bytes(size: int) -> int:
    """Bytes that the caching allocator uses for ``size`` bytes."""
    return -(-size // ALLOCATOR_GRANULARITY) * ALLOCATOR_GRANULARITY


def custom_op_flops(name: str, args: tuple[Any, ...]) -> int:
    """FLOPs of one of the project's own operators; 2 FLOPs per multiply-add.

    The backward pass has five products instead of two, as it computes the scores once more.
    """
    shapes: list[Any] = [tuple(x.shape) if isinstance(x, Tensor) else () for x in args]
    operator = name.split(".")[0].removesuffix("_backward")
    backward = "_backward" in name

    if operator in BACKWARD_QUERY_INDEX:
        query_index = BACKWARD_QUERY_INDEX[operator] if backward else 0
        (batch, heads, queries, head_dim), (_, _, keys, _) = shapes[query_index : query_index + 2]

        # half of the square of the queries with their own keys is masked
        pairs = queries * keys - queries * queries // 2
        return (10 if backward else 4) * batch * heads * head_dim * pairs

    assert operator == "in_block_attention", name
    qkv = shapes[backward]  # [..., m, 3, H, D]
    return (10 if backward else 4) * math.prod(qkv) // 3 * qkv[-4]
