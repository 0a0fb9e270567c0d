"""Self-check of an attention backend on this machine before a run trusts it: output and gradients
against the reference in fp64.

Compilers, drivers and libraries differ from those that the tests ran with. A backend that fails,
or computes something else, is disabled for this process: ``auto`` selects the next one, and a
backend that was named is an error.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bitlm_dist.kernels import attention
from bitlm_dist.kernels.attention_inputs import AttentionInputs, validate_inputs
from bitlm_dist.kernels.in_block import in_block_attention

SEQUENCE_LENGTH = 400  # several tiles, the last of them incomplete
NUM_BLOCKS = 100

# Relative to the largest element: several times the rounding error, and below the error of a wrong
# mask.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def select_verified_backend(inputs: AttentionInputs, backend: str = "auto") -> str:
    """Select a backend for calls like this one after verifying it numerically on this machine.

    Returns:
        The name of the backend.

    Raises:
        ValueError: the named backend is unavailable, does not support the call, or failed.
    """
    while True:
        name = attention.select_backend(inputs, backend)
        reason = (
            None
            if name == "reference"
            else _failure_reason(partial(attention_mismatch, name, inputs))
        )
        if reason is None:
            return name

        # the next selection excludes it, or raises if it was named
        attention.disable_backend(name, reason)


def verify_in_block_kernels(qkv: Tensor) -> None:
    """Verify the Triton kernels of in-block attention on this machine; disable them if they fail.

    Args:
        qkv: [..., M, 3, H, D], of the shape, dtype and device to verify. Its elements are not read.
    """
    if attention.unavailable_reason("triton") is None and (
        reason := _failure_reason(partial(in_block_mismatch, qkv))
    ):
        attention.disable_backend("triton", f"inside blocks, {reason}")


def _failure_reason(check: Callable[[], str | None]) -> str | None:
    # A compiler or a library may raise anything.
    try:
        return check()
    except Exception as error:
        return f"it fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def attention_mismatch(name: str, like: AttentionInputs) -> str | None:
    """Compare a backend with the reference in fp64: output and gradients, with one document per row
    and with several, for heads in groups of the same size as those of the call.

    Args:
        name: an available backend that supports the call.
        like: gives head dimension, block, scale, dtype and device.

    Returns:
        Which result differs by more than rounding; None if none does.
    """
    group = like.q.shape[1] // like.k.shape[1]
    inputs = [
        _random((2, count, SEQUENCE_LENGTH, like.q.shape[3]), like.q) for count in (group, 1, 1)
    ]

    # 3 documents in the first row, 5 in the second
    several = (
        torch.arange(SEQUENCE_LENGTH, device=like.q.device)
        * torch.tensor([[3], [5]], device=like.q.device)
        // SEQUENCE_LENGTH
    )

    for ids in (None, several):
        # the default argument binds the ids of this iteration
        def attend(by: str, q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None = ids) -> Tensor:
            return attention.dispatch(
                validate_inputs(q, k, v, like.block, ids, scale=like.scale), by
            )

        reason = _mismatch(partial(attend, name), partial(attend, "reference"), inputs)
        if reason is not None:
            return reason

    return None


def in_block_mismatch(like: Tensor) -> str | None:
    """Compare in-block attention with torch's in fp64, as :func:`attention_mismatch` does.

    Args:
        like: [..., M, 3, H, D]; gives shape, dtype and device.
    """
    block = like.shape[-4]
    inputs = [_random((NUM_BLOCKS, *like.shape[-4:]), like)]
    candidate, reference = (
        partial(in_block_attention, block=block, backend=name) for name in ("auto", "torch")
    )
    return _mismatch(candidate, reference, inputs)


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype).requires_grad_()


def _mismatch(
    candidate: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]
) -> str | None:
    """Description of the first result, output or gradient, that differs by more than rounding."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = candidate(*inputs)
        expected = reference(*exact)

        # one random cotangent for both
        weight = _random(out.shape, out).detach()
        actual_values = out, *torch.autograd.grad(out, inputs, weight)
        expected_values = expected, *torch.autograd.grad(expected, exact, weight.double())

    names = ["output", *(f"gradient {number}" for number in range(1, 1 + len(inputs)))]
    for name, x, y in zip(names, actual_values, expected_values, strict=True):
        error = ((x.double() - y).abs().max() / y.abs().max()).item()
        if not error < TOLERANCE.get(x.dtype, 1e-9):  # true of NaN as well
            return f"its {name} differs from fp64 by {error:.1g} of the largest element"

    return None
