"""A small trial of a back end on this machine before a run trusts it: output and gradients against the reference in fp64.

Compilers, drivers and libraries are not the ones that the tests ran with. A back end that fails its trial, or computes something
else, is not used by this process again: ``auto`` goes on to the next, a forced one is an error.
"""

from collections.abc import Callable
from functools import partial

import torch
from bitlm_dist.kernels import attention
from bitlm_dist.kernels.call import Call, checked
from bitlm_dist.kernels.in_block import in_block_attention
from torch import Tensor

LENGTH = 400  # several tiles, the last of them not whole
BLOCKS = 100
# Of the largest number. What rounding leaves is several times smaller, what a wrong mask leaves larger.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def proven(call: Call, backend: str = "auto") -> str:
    """Name of the back end that runs calls like this one, once it has stood its trial.

    Raises:
        ValueError: a forced back end is not here, does not take the call, or failed.
    """
    while True:
        name = attention.choose(call, backend)
        reason = None if name == "reference" else _failure(partial(_attention_differs, name, call))
        if reason is None:
            return name
        attention.distrust(name, reason)


def prove_in_block(qkv: Tensor) -> None:
    """The same for the Triton kernels of attention inside blocks, for which PyTorch's products stand in: qkv [..., m, 3, H, D]."""
    if attention.missing("triton") is None and (reason := _failure(partial(_in_block_differs, qkv))):
        attention.distrust("triton", f"inside blocks, {reason}")


def _failure(trial: Callable[[], str | None]) -> str | None:
    try:
        return trial()
    except Exception as error:  # of a compiler or a library, whatever ails it
        return f"it fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _attention_differs(name: str, like: Call) -> str | None:
    """With one document and with several; heads in groups as large as those of the call."""
    group = like.q.shape[1] // like.k.shape[1]
    inputs = [_random((2, count, LENGTH, like.q.shape[3]), like.q) for count in (group, 1, 1)]
    several = torch.arange(LENGTH, device=like.q.device) * torch.tensor([[3], [5]], device=like.q.device) // LENGTH
    for ids in (None, several):

        def attend(by: str, q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None = ids) -> Tensor:
            return attention.attend(checked(q, k, v, like.block, ids, scale=like.scale), by)

        reason = _difference(partial(attend, name), partial(attend, "reference"), inputs)
        if reason is not None:
            return reason
    return None


def _in_block_differs(like: Tensor) -> str | None:
    block = like.shape[-4]
    inputs = [_random((BLOCKS, *like.shape[-4:]), like)]
    found, right = (partial(in_block_attention, block=block, backend=name) for name in ("auto", "torch"))
    return _difference(found, right, inputs)


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype).requires_grad_()


def _difference(run: Callable[..., Tensor], truth: Callable[..., Tensor], inputs: list[Tensor]) -> str | None:
    """What differs by more than rounding: the output, or the gradient of an input."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, expected = run(*inputs), truth(*exact)
        weight = _random(out.shape, out).detach()
        found = out, *torch.autograd.grad(out, inputs, weight)
        right = expected, *torch.autograd.grad(expected, exact, weight.double())
    names = ["output", *(f"gradient {number}" for number in range(1, 1 + len(inputs)))]
    for name, x, y in zip(names, found, right, strict=True):
        error = ((x.double() - y).abs().max() / y.abs().max()).item()
        if not error < TOLERANCE.get(x.dtype, 1e-9):  # NaN too
            return f"its {name} differs from fp64 by {error:.1g} of the largest number"
    return None
