"""What a training step does on a GPU, operator by operator: memory and its origins, FLOPs, collectives, waits, transfers.

:class:`Tracer` is a dispatch mode: it sees every operator of forward, backward, optimizer and communication. Operators on CUDA
tensors are answered by fake tensors (:mod:`bitlm_dist.planning.fake_cuda`), operators on CPU tensors run as they are.
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
from bitlm_dist.planning.fake_cuda import GPU, KNOWN, to_gpu, waited

aten = torch.ops.aten
QUERIES_OF_BACKWARD = {"block_causal_attention": 2, "flash_attention_4": 1}  # which argument they are; keys follow
PINNING = (aten.pin_memory, aten._pin_memory)
ROUNDING = 512  # bytes of the caching allocator
LARGE = 2**20  # bytes of a tensor whose origin is kept; smaller ones are one origin
LIBRARIES, WRAPPERS = {"megatron", "deepspeed"}, {"accelerator", "comm", "utils"}
HERE, KERNELS = Path(__file__).parent, Path(kernels.__file__).parent


@dataclass(frozen=True)
class Collective:
    """A collective or point-to-point message: operator, group, and bytes sent or received by this rank, whichever is larger."""

    operator: str
    group: str
    bytes: int


@dataclass(frozen=True)
class Place:
    """A line of source, and what it does there."""

    file: str  # folder/file.py
    function: str
    line: int
    reason: str


@dataclass
class StepTrace:
    """What was seen, by phase where a mapping has phases: ``build``, ``step 0``, …

    Attributes:
        parameters: shape of every weight that the rank holds, by name.
        buffers: bytes of every buffer, by name.
        static_bytes: held when the phase ended.
        peak_bytes: most that was held in it.
        origins: at the peak, bytes by module and operator.
        flops: of matrix products and attention.
        operators: number of operators on CUDA tensors.
        collectives: in order.
        waits: where the host waits for the GPU, and how often.
        transfers: bytes between host and device, by place; the reason names the direction.
    """

    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)
    static_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: Counter[str] = field(default_factory=Counter)
    origins: dict[str, Counter[str]] = field(default_factory=dict)
    flops: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    collectives: dict[str, list[Collective]] = field(default_factory=lambda: defaultdict(list))
    waits: dict[str, Counter[Place]] = field(default_factory=lambda: defaultdict(Counter))
    transfers: dict[str, Counter[Place]] = field(default_factory=lambda: defaultdict(Counter))


class Tracer(TorchDispatchMode):
    """See the module.

    Args:
        fake: what :func:`~bitlm_dist.planning.fake_cuda.fake_gpu` yielded.
        group_names: names of process groups by torch's own, see :func:`bitlm_dist.parallel.mesh.group_names`; asked for when a
            collective comes.
        all_fake: in the first phase CPU tensors are fake too, so that a model of any size is built in no memory.
    """

    def __init__(self, fake: FakeTensorMode, group_names: Callable[[], Mapping[str, str]], all_fake: bool) -> None:
        super().__init__()
        self._all_fake = all_fake
        self.found, self.phase = StepTrace(), "build"
        self._fake, self._group_names = fake, group_names
        self._modules = _Modules()
        self._alive: dict[int, tuple[Any, int, str]] = {}  # storages on the GPU
        self._pinned_storages: set[int] = set()
        self._now, self._held, self._origin, self._operator = 0, Counter[str](), "", ""
        self._answers: dict[Any, Callable[..., Any]] = {
            aten._local_scalar_dense: self._item,
            aten.nonzero: self._nonzero,
            aten.index: self._index,
            aten.bincount: self._bincount,
            aten._to_copy: self._to_copy,
            aten.copy_: self._copy,
        }

    def begin(self, phase: str) -> None:
        """End the phase before."""
        self._all_fake = False
        self._modules.forget()
        gc.collect()  # free reference cycles now, or their memory counts until some later collection
        self.found.static_bytes[self.phase] = self._now
        self.phase = phase
        self.found.peak_bytes[phase] = self._now
        self.found.origins[phase] = self._held.copy()

    def __enter__(self) -> "Tracer":
        self._modules.__enter__()
        waited.append(self._wait)
        self._resizing = mock.patch.object(torch.UntypedStorage, "resize_", self._resize_and_count())
        self._resizing.start()
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") goes through here
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        self._resizing.stop()
        waited.remove(self._wait)
        self._modules.__exit__(*exc)
        self.found.static_bytes[self.phase] = self._now

    def __torch_dispatch__(self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Answer an operator."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args)
        if func._overloadpacket in PINNING:
            return self._pinned(args[0].clone())
        if not self._all_fake and not _on_gpu(args, kwargs):
            return func(*args, **kwargs)
        if _is_composite(func):  # tensors of inference mode bring operators whole
            super().__enter__()  # the mode alone: hooks and callbacks are there
            try:
                return func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)

        self._origin, self._operator = self._modules.current(), func.__name__
        self.found.operators[self.phase] += 1
        packet = func._overloadpacket
        answer = self._answers.get(packet)
        out = NotImplemented if answer is None else answer(func, args, kwargs)
        if out is NotImplemented:
            out = self._run(func, args, kwargs)
        if packet in flop_registry:
            self.found.flops[self.phase] += flop_registry[packet](*args, **kwargs, out_val=out)
        elif func.namespace == "bitlm":
            self.found.flops[self.phase] += own_flops(func.__name__, args)
        for x in tree_iter(out):
            self.hold(x)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self._fake:
            return func(*args, **kwargs)

    # --- memory ------------------------------------------------------------------------------------------------------------

    def hold(self, x: Any) -> None:
        """Count the storage of a tensor until it is gone."""
        if not isinstance(x, FakeTensor) or x.device.type != "cuda":
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return

        size = _rounded(storage.nbytes())
        origin = f"{self._origin}: {self._operator}" if size >= LARGE else "small tensors"
        self._alive[key] = weakref.ref(storage, lambda _: self._let_go(key)), size, origin
        self._add(size, origin)

    def _let_go(self, key: int) -> None:
        _, size, origin = self._alive.pop(key)
        self._add(-size, origin)

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """FSDP2 frees gathered weights by resizing their storage to 0."""
        if storage._cdata in self._alive:
            reference, old, origin = self._alive[storage._cdata]
            self._alive[storage._cdata] = reference, _rounded(size), origin
            self._add(_rounded(size) - old, origin)

    def _resize_and_count(self) -> Callable[[torch.UntypedStorage, int], torch.UntypedStorage]:
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            self._resized(storage, size)
            return resize(storage, size)

        return resize_and_count

    def _add(self, size: int, origin: str) -> None:
        if self.found.origins.get(self.phase) is self._held:
            self._held = self._held.copy()
        self._now += size
        self._held[origin] += size
        if self._now > self.found.peak_bytes[self.phase]:
            self.found.peak_bytes[self.phase] = self._now
            self.found.origins[self.phase] = self._held  # copied when it changes again

    # --- numbers -----------------------------------------------------------------------------------------------------------

    def _item(self, func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0]
        self._wait("item")
        known = vars(x).get(KNOWN)
        if known is not None and known.numel() == 1 and not isinstance(known, FakeTensor):
            return known.item()
        return True if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1

    def _places_of(self, mask: Tensor) -> Tensor:
        """nonzero(mask), as if every element were true."""
        self._wait("nonzero")
        with self._fake:
            return torch.empty_strided((mask.numel(), mask.dim()), (1, mask.numel()), dtype=torch.int64, device=GPU)

    def _nonzero(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._places_of(args[0])

    def _index(self, func: Any, args: Any, kwargs: Any) -> Any:
        chosen: list[Any] = []
        for index in args[1]:
            masked = index is not None and index.dtype == torch.bool
            chosen += self._places_of(index).unbind(1) if masked else [index]
        return self._run(func, (args[0], chosen), kwargs)

    def _bincount(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._wait("bincount")
        bins = kwargs.get("minlength", args[2] if len(args) > 2 else 1)
        share, rest = divmod(args[0].numel(), bins)
        with _disable_current_modes():
            counts = torch.tensor([share + (i < rest) for i in range(bins)])
        return to_gpu(counts, self._fake)

    # --- between host and device ---------------------------------------------------------------------------------------------

    def _to_copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, device = args[0], kwargs.get("device")
        target = x.device if device is None else torch.device(device)
        if x.device.type == "cuda" and target.type == "cpu":
            return self._to_host(x, kwargs)
        if x.device.type == "cpu" and target.type == "cuda":
            self._to_device(x, kwargs.get("non_blocking", False))
            dtype = kwargs.get("dtype") or x.dtype
            return to_gpu(torch.empty_like(x, dtype=dtype) if isinstance(x, FakeTensor) else x.to(dtype, copy=True), self._fake)
        return NotImplemented

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, source = args[0], args[1]
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if target.device.type == "cpu" and source.device.type == "cuda":
            self._transfer("to the host", source)
            if blocking or not self._is_pinned(target):
                self._wait("copy to the host")
            return target.copy_(self._numbers(source)) if not isinstance(target, FakeTensor) else target
        if target.device.type == "cuda" and source.device.type == "cpu":
            self._to_device(source, not blocking)
        return NotImplemented

    def _to_host(self, x: Tensor, kwargs: Any) -> Tensor:
        self._transfer("to the host", x)
        found = self._numbers(x).to(kwargs.get("dtype") or x.dtype)
        if kwargs.get("non_blocking", False):
            return self._pinned(found)  # as torch allocates it then
        self._wait("copy to the host")
        return found

    def _numbers(self, x: Tensor) -> Tensor:
        """Real values to stand in for a fake tensor's."""
        known: Tensor | None = vars(x).get(KNOWN)
        with _disable_current_modes():
            if known is not None and known.shape == x.shape and not isinstance(known, FakeTensor):
                return known.clone()
            return torch.zeros(x.shape, dtype=x.dtype)

    def _to_device(self, x: Tensor, non_blocking: bool) -> None:
        self._transfer("to the device", x)
        if not (non_blocking and self._is_pinned(x)):
            self._wait("copy of pageable memory to the device")

    def _pinned(self, x: Tensor) -> Tensor:
        """Mark the storage of a host tensor, which its views share."""
        storage = x.untyped_storage()
        self._pinned_storages.add(storage._cdata)
        weakref.finalize(storage, self._pinned_storages.discard, storage._cdata)
        return x

    def _is_pinned(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self._pinned_storages

    def _transfer(self, direction: str, x: Tensor) -> None:
        self.found.transfers[self.phase][_here(direction)] += x.numel() * x.element_size()

    def _wait(self, reason: str) -> None:
        self.found.waits[self.phase][_here(reason)] += 1

    # --- other ranks -------------------------------------------------------------------------------------------------------

    def _collective(self, func: Any, args: Any) -> Any:
        name = func.__name__.split(".")[0].strip("_")
        lists = [[x for x in tree_iter(argument) if isinstance(x, Tensor)] for argument in args]
        if name != "barrier" and any(x.device.type != "cuda" for tensors in lists for x in tensors):
            raise RuntimeError(f"{name}: NCCL takes no tensor on the CPU")
        group = next((named for x in tree_iter(args) if (named := self._group_of(x))), "?")
        size = max((sum(x.numel() * x.element_size() for x in tensors) for tensors in lists), default=0)
        self.found.collectives[self.phase].append(Collective(name, group, size))
        work = torch._C._distributed_c10d.FakeWork().boxed()  # type: ignore[attr-defined]
        return (args[0], work) if len(func._schema.returns) == 2 else work

    def _group_of(self, x: Any) -> str:
        if not isinstance(x, torch.ScriptObject):
            return ""
        try:
            name = dist.ProcessGroup.unbox(x).group_name
        except RuntimeError:  # another kind of object
            return ""
        return self._group_names().get(name, f"group {name}")


@functools.cache
def _is_composite(func: Any) -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return func.namespace == "aten" and has_kernel(func.name(), "CompositeImplicitAutograd")


def _on_gpu(args: Any, kwargs: Any) -> bool:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        return True
    return any(isinstance(x, Tensor) and (x.device.type == "cuda" or isinstance(x, FakeTensor)) for x in tree_iter((args, kwargs)))


def _here(reason: str) -> Place:
    """The innermost line of the project, Megatron-core or DeepSpeed that is at work; in backward passes there may be none."""
    frame = sys._getframe(1)
    while frame is not None:
        code, file = frame.f_code, Path(frame.f_code.co_filename)
        ours = file.parent != HERE and (file.is_relative_to(HERE.parent) or file.parent == KERNELS)
        if ours or (LIBRARIES & set(file.parts) and file.parent.name not in WRAPPERS):
            return Place(f"{file.parent.name}/{file.name}", code.co_name, frame.f_lineno, reason)
        frame = frame.f_back  # type: ignore[assignment]
    return Place("backward", "", 0, reason)


class _Modules:
    """Which module is at work, in a backward pass the one whose forward pass made the node.

    torch's ModuleTracker, which knows that too, keeps every graph alive until it ends.
    """

    def __init__(self) -> None:
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._stack: list[str] = []
        self._by_node: dict[int, str] = {}  # sequence numbers of autograd's nodes
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        self._hooks = [
            register_module_forward_pre_hook(self._push),
            register_module_forward_hook(self._pop, always_call=True),
        ]

    def __exit__(self, *exc: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def current(self) -> str:
        """Its name, without numbers of layers; called once for every operator."""
        node = torch._C._current_autograd_node()
        if node is not None and not self._stack:
            return self._by_node.get(node._sequence_nr(), "backward")
        name = self._stack[-1] if self._stack else "outside of modules"
        last: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self._by_node.setdefault(last - 1, name)  # the node of this operator, if it made one, was made just before
        return name

    def _pop(self, module: nn.Module, inputs: Any, output: Any) -> None:
        assert self._stack.pop() == self._names[module]

    def forget(self) -> None:
        """No backward pass is to come."""
        self._by_node.clear()

    def _push(self, module: nn.Module, inputs: Any) -> None:
        if module not in self._names:
            for name, part in module.named_modules(prefix=type(module).__name__):
                self._names.setdefault(part, ".".join(word for word in name.split(".") if not word.isdigit()))
        self._stack.append(self._names[module])


def _rounded(size: int) -> int:
    """Bytes that the caching allocator takes for them."""
    return -(-size // ROUNDING) * ROUNDING


def own_flops(name: str, args: tuple[Any, ...]) -> int:
    """FLOPs of one of the project's own operators: a product counts 2, its backward pass computes the scores once more."""
    shapes: list[Any] = [tuple(x.shape) if isinstance(x, Tensor) else () for x in args]
    operator, backward = name.split(".")[0].removesuffix("_backward"), "_backward" in name
    if operator in QUERIES_OF_BACKWARD:
        first = QUERIES_OF_BACKWARD[operator] if backward else 0
        (batch, heads, queries, width), (_, _, keys, _) = shapes[first : first + 2]
        pairs = queries * keys - queries * queries // 2  # half of the queries' own square lies in the future
        return (10 if backward else 4) * batch * heads * width * pairs
    assert operator == "in_block_attention", name
    qkv = shapes[backward]  # [..., m, 3, H, D]
    return (10 if backward else 4) * math.prod(qkv) // 3 * qkv[-4]
