"""Kernels that operators launch on a GPU, and the bytes that these move to and from its memory.

An operator that computes or copies is one kernel, although some are several; one that only makes a
view or allocates is none. A kernel reads its inputs once and writes its outputs once, as if its
caches held all that it reads again.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten
from typing_extensions import override

aten = torch.ops.aten

# no views by their schema, and yet without a kernel
ALLOCATIONS = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
    *(aten._unsafe_view, aten.resize_, aten.set_, aten.record_stream),
}
# operators that write their first argument without reading it
OVERWRITING = {
    *(aten.copy_, aten.fill_, aten.zero_, aten._foreach_copy_, aten._foreach_zero_),
    *(aten.normal_, aten.uniform_, aten.random_, aten.bernoulli_, aten.exponential_),
}
# operators that read as many elements of their first argument as they write
LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}

# called with the name, the tensors read and the tensors written by each kernel that stands for more
# than one operator
fused_kernel_callbacks: list[Callable[[str, list[Tensor], list[Tensor]], None]] = []


def operator_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    """Bytes that an operator moves in GPU memory.

    Args:
        func: the dispatched operator.
        args, kwargs: its arguments.
        out: its result.

    Returns:
        None if it launches no kernel.
    """
    packet = func._overloadpacket
    if func.is_view or packet in ALLOCATIONS:
        return None

    read: list[Tensor] = []
    written: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write

        if is_written:
            written += _gpu_tensors(value)
        if not (is_written and (argument.is_out or packet in OVERWRITING)):
            read += _gpu_tensors(value)

    # results that are arguments are counted already
    returns = func._schema.returns
    for declared, value in zip(returns, out if len(returns) > 1 else (out,), strict=False):
        if declared.alias_info is None:
            written += _gpu_tensors(value)

    if not written:
        return None
    if packet in LOOKUPS:
        read[0] = written[0]
    return sum(map(tensor_bytes, (*read, *written)))


def tensor_bytes(x: Tensor) -> int:
    """Bytes of the elements of a tensor; elements that it repeats count once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def run_fused(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function as if it were one kernel, as compiled regions and fused operators are.

    It saves its tensor arguments for the backward pass and no intermediate result. Its backward
    pass is one kernel, and one more for the gradients of small tensors that all rows share, such as
    weights.

    Args:
        name: of the kernel.
        function: runs on fake tensors.
        args, kwargs: its arguments.

    Returns:
        The result of ``function``; it may be a tensor or a flat structure of tensors.
    """
    leaves, structure = tree_flatten((args, kwargs))
    is_tensor = [isinstance(x, Tensor) for x in leaves]
    tensors = [x for x in leaves if isinstance(x, Tensor)]

    # a part of a larger kernel, or not on the GPU
    if _FusedKernel.is_running or not _gpu_tensors(tensors):
        return function(*args, **kwargs)

    def run(*tensors: Tensor) -> Any:
        given = iter(tensors)
        values = [next(given) if t else x for x, t in zip(leaves, is_tensor, strict=True)]
        args, kwargs = tree_unflatten(values, structure)
        return function(*args, **kwargs)

    return _FusedKernel.apply(name, run, *tensors)


class _FusedKernel(torch.autograd.Function):
    """Function of fake tensors that is one kernel."""

    is_running = False

    @staticmethod
    @override
    def forward(ctx: Any, name: str, function: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.name = name
        ctx.save_for_backward(*tensors)
        fake = detect_fake_mode(tensors) or nullcontext()

        # without the tracer, which would count each operator
        _FusedKernel.is_running = True
        try:
            with _disable_current_modes(), fake:
                out = function(*tensors)
        finally:
            _FusedKernel.is_running = False

        _notify(name, tensors, _gpu_tensors(out))
        return out

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        read = [x for x in (*ctx.saved_tensors, *grads) if x is not None]
        grads_in = [
            torch.empty_like(x, memory_format=torch.contiguous_format) if needs_grad else None
            for x, needs_grad in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]

        written = [x for x in grads_in if x is not None]
        largest = max(x.numel() for x in written)
        for of_rows in (True, False):
            group = [x for x in written if (x.numel() == largest) == of_rows]
            if group:
                _notify(f"{ctx.name} backward", read, group)

        return (None, None, *grads_in)


def _notify(name: str, read: Iterable[Tensor], written: list[Tensor]) -> None:
    for callback in fused_kernel_callbacks:
        callback(name, _gpu_tensors(read), written)


def _gpu_tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_iter(values) if isinstance(x, Tensor) and x.device.type != "cpu"]
