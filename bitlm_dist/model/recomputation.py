"""Recomputation of single steps of a layer: the backward pass computes a tensor once more instead
of keeping it.

Megatron's own CheckpointWithoutOutput does this only where Transformer Engine is installed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

Outputs = Tensor | tuple[Tensor, ...]


@contextmanager
def recomputed(function: Callable[..., Outputs], *inputs: Tensor) -> Iterator[Outputs]:
    """Run a function whose outputs are not kept for the backward pass.

    What runs inside the context saves references to the outputs instead of the outputs. When its
    backward pass needs the first of them, ``function`` runs again. Of nested contexts, only the
    innermost one replaces what is saved.

    Args:
        function: maps tensors to tensors; it must compute the same values each time.
        inputs: its arguments, which are kept.

    Yields:
        The outputs of ``function``. Their memory is freed with the last reference.
    """
    if not torch.is_grad_enabled():
        yield function(*inputs)
        return

    outputs = _Recomputed.apply(function, *inputs)
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    node = tensors[0].grad_fn
    indices = {_storage_key(x): index for index, x in enumerate(tensors)}

    def pack(x: Tensor) -> "Tensor | _Reference":
        """Replace an output, or a view of one, by a reference."""
        index = indices.get(_storage_key(x))
        if index is None:
            return x
        return _Reference(node, index, x.size(), x.stride(), int(x.storage_offset()))

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield outputs


class _Reference(NamedTuple):
    """View of an output that can be computed again.

    Attributes:
        node: autograd node of the function.
        output_index: which of its outputs.
    """

    node: Any
    output_index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _storage_key(x: Tensor) -> int:
    key: int = x.untyped_storage()._cdata
    return key


def _unpack(saved: Tensor | _Reference) -> Tensor:
    if isinstance(saved, Tensor):
        return saved

    output = _run_again(saved.node)[1][saved.output_index].detach()
    return output.as_strided(saved.size, saved.stride, saved.offset)


def _run_again(node: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run the function of a node with gradients, at most once.

    Returns:
        Its inputs and outputs.
    """
    if node.second_run is None:
        inputs = tuple(
            x.detach().requires_grad_(needs_grad)
            for x, needs_grad in zip(node.saved_tensors, node.needs_input_grad[1:], strict=True)
        )

        with torch.enable_grad():
            outputs = node.function(*inputs)
        node.second_run = inputs, outputs if isinstance(outputs, tuple) else (outputs,)

    second_run: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = node.second_run
    return second_run


class _Recomputed(torch.autograd.Function):
    """Function that keeps its inputs only, and runs again for its backward pass."""

    @staticmethod
    @override
    def forward(ctx: Any, function: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
        ctx.function = function
        ctx.second_run = None
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, outputs = _run_again(ctx)
        ctx.second_run = None

        # weights that the function reads get their gradients here, and Megatron's hooks run
        torch.autograd.backward(outputs, grads)
        return (None, *(x.grad for x in inputs))
