"""Time and memory of both attentions: every backend beside torch's own kernels, interleaved in one
process. `bitlm bench` prints and plots the results.

Block-causal attention is rated in FLOP/s over the exact mask: 4·D FLOPs per visible pair forward
and 10·D backward. In-block attention is rated in bytes/s: it must move 4 elements per token, head
and dimension forward, and 7 backward.

Legend: B batch, H query heads, G key-value heads, S sequence length, D head dimension.
"""

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitlm_dist.errors import UserError
from bitlm_dist.kernels import attention, in_block
from bitlm_dist.kernels.attention_inputs import AttentionInputs, validate_inputs, visible_key_ranges

# torch's own kernels
CAUSAL = "causal flash"
DENSE = "SDPA, dense mask"
BLOCKS = "SDPA of blocks"
COPY = "copy"

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
MAX_REFERENCE_SCORES = 2**29  # with more, the reference runs only by name
MIN_SECONDS = 0.02  # per measurement: short calls are repeated


@dataclass(frozen=True)
class AttentionShape:
    """Shape to measure: of attention over the sequence, or within its blocks (then H = G, and there
    are no documents).
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    block: int
    documents: int = 1  # per row, of equal length
    dtype: str = "float32"


@dataclass(frozen=True)
class KernelTiming:
    """Measurements of one kernel."""

    forward: list[float]  # seconds per call, one entry per repeat
    backward: list[float]  # seconds per call, one entry per repeat
    forward_work: float  # FLOPs or bytes per call
    backward_work: float  # FLOPs or bytes per call

    # peak allocation of forward and backward together, beyond the inputs; None: not measured
    peak_bytes: int | None

    @property
    def total(self) -> float:
        """Sum of the median seconds of forward and backward."""
        return statistics.median(self.forward) + statistics.median(self.backward)

    @property
    def rates(self) -> tuple[float, float]:
        """Median work per second, forward and backward."""
        forward = self.forward_work / statistics.median(self.forward)
        backward = self.backward_work / statistics.median(self.backward)
        return forward, backward


class TimedKernel(NamedTuple):
    """Forward and backward calls to time."""

    forward: Callable[[], Tensor]
    backward: Callable[[], object]
    forward_work: float  # FLOPs or bytes per call
    backward_work: float  # FLOPs or bytes per call


def bench_attention(
    shape: AttentionShape,
    repeats: int,
    backends: Sequence[str] = (),
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, KernelTiming]:
    """Measure block-causal attention, beside causal flash attention and SDPA with a dense mask.

    Args:
        shape: shape of the inputs.
        repeats: number of measurements per kernel.
        backends: names of backends; all that can train here by default.
        report: called after every repeat with their number so far.

    Raises:
        UserError: a named backend does not support the shape.
    """
    inputs, attention_inputs = _make_attention_inputs(shape)
    scores = shape.batch * shape.heads * shape.length**2
    available = [
        name
        for name in attention.available_backends()
        if name != "reference" or scores <= MAX_REFERENCE_SCORES
    ]
    names = _select_backends(
        backends, available, lambda name: attention.select_backend(attention_inputs, name)
    )

    at = torch.arange(shape.length, device=default_device())
    low, high = (x[:, None, :, None] for x in visible_key_ranges(attention_inputs))
    grouped = shape.heads != shape.kv_heads
    dense = partial(
        F.scaled_dot_product_attention, attn_mask=(at >= low) & (at < high), enable_gqa=grouped
    )

    # multiply-adds of one product over all pairs; without documents one row of bounds serves all
    per_pair = shape.heads * shape.width
    pairs = per_pair * float((high - low).sum(dtype=torch.int64)) * shape.batch / len(low)
    causal = per_pair * shape.batch * shape.length * (shape.length + 1) / 2

    timed = {
        name: _timed_kernel(
            partial(_dispatch, name, attention_inputs), inputs, 4 * pairs, 10 * pairs
        )
        for name in names
    }
    timed[CAUSAL] = _timed_kernel(partial(_causal_flash, grouped), inputs, 4 * causal, 10 * causal)
    timed[DENSE] = _timed_kernel(dense, inputs, 4 * pairs, 10 * pairs)
    return _measure(timed, repeats, report)


def _make_attention_inputs(shape: AttentionShape) -> tuple[list[Tensor], AttentionInputs]:
    """Random q, k and v, and the validated call with the documents of the shape."""
    head_counts = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = inputs = [
        _random((shape.batch, count, shape.length, shape.width), shape) for count in head_counts
    ]

    at = torch.arange(shape.length, device=default_device())
    ids = (at * shape.documents // shape.length).expand(shape.batch, -1)
    return inputs, validate_inputs(
        q, k, v, shape.block, document_ids=None if shape.documents == 1 else ids
    )


def bench_in_block(
    shape: AttentionShape,
    repeats: int,
    backends: Sequence[str] = (),
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, KernelTiming]:
    """Measure in-block attention, beside SDPA over a batch of blocks and a copy of as many bytes.

    Args:
        shape: shape of the inputs.
        repeats: number of measurements per kernel.
        backends: names of backends; all that are available here by default.
        report: called after every repeat with their number so far.

    Raises:
        UserError: a named backend does not support the shape.
    """
    num_blocks = shape.batch * shape.length // shape.block
    qkv = _random((num_blocks, shape.block, 3, shape.heads, shape.width), shape)
    names = _select_backends(backends, in_block.BACKENDS, lambda name: _in_block(name, qkv[:1]))

    # forward reads q, k, v and writes out; backward reads q, k, v, dout and writes dq, dk, dv
    out_numel = num_blocks * shape.block * shape.heads * shape.width
    work = 4.0 * out_numel * qkv.element_size(), 7.0 * out_numel * qkv.element_size()
    timed = {name: _timed_kernel(partial(_in_block, name), [qkv], *work) for name in names}
    timed[BLOCKS] = _timed_kernel(_in_block_sdpa, [qkv], *work)

    # a copy reads and writes, so half of the elements are copied
    source, target = (
        torch.randn(7 * out_numel // 2, dtype=qkv.dtype, device=qkv.device) for _ in range(2)
    )
    copy = TimedKernel(
        lambda: target[: 2 * out_numel].copy_(source[: 2 * out_numel]),
        lambda: target.copy_(source),
        *work,
    )
    timed[COPY] = copy
    return _measure(timed, repeats, report)


def _select_backends(
    named: Sequence[str], available: Sequence[str], attempt: Callable[[str], object]
) -> list[str]:
    """Return the named backends, or all that support the shape.

    Raises:
        UserError: a named backend raised in ``attempt``.
    """
    selected = []
    for name in named or available:
        try:
            attempt(name)
        except ValueError as error:
            if named:
                raise UserError(str(error)) from None
        else:
            selected.append(name)

    return selected


def default_device() -> torch.device:
    """CUDA device if there is one, else CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _random(size: tuple[int, ...], shape: AttentionShape) -> Tensor:
    return (
        torch.randn(size, device=default_device()).to(getattr(torch, shape.dtype)).requires_grad_()
    )


def _dispatch(name: str, inputs: AttentionInputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.dispatch(inputs.with_qkv(q, k, v), name)


def _causal_flash(grouped: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # flash attention does not support fp32 on a GPU; the kernel that does has no grouped heads
    if q.is_cuda and q.dtype == torch.float32:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def _in_block(name: str, qkv: Tensor) -> Tensor:
    return in_block.in_block_attention(qkv, qkv.shape[1], backend=name)


def _in_block_sdpa(qkv: Tensor) -> Tensor:
    q, k, v = (x.transpose(-2, -3) for x in qkv.unbind(-3))
    return F.scaled_dot_product_attention(q, k, v)


def _timed_kernel(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], forward_work: float, backward_work: float
) -> TimedKernel:
    out = run(*inputs)
    weight = torch.randn_like(out)

    # the graph is retained, so that backward runs alone, any number of times
    return TimedKernel(
        lambda: run(*inputs),
        lambda: torch.autograd.grad(out, inputs, weight, retain_graph=True),
        forward_work,
        backward_work,
    )


def _measure(
    timed: Mapping[str, TimedKernel], repeats: int, report: Callable[[int], None]
) -> dict[str, KernelTiming]:
    """Time all kernels, interleaved so that slow phases of the machine affect all of them alike."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in timed}
    num_calls = {name: [_num_calls(work) for work in kernel[:2]] for name, kernel in timed.items()}

    for repeat in range(repeats):
        for name, kernel in timed.items():
            for seconds, work, count in zip(times[name], kernel[:2], num_calls[name], strict=True):
                seconds.append(_seconds(work, count))
        report(repeat + 1)

    return {
        name: KernelTiming(*times[name], *kernel[2:], _peak_bytes(kernel))
        for name, kernel in timed.items()
    }


def _num_calls(work: Callable[[], object]) -> int:
    """Number of calls whose duration a clock can measure."""
    _seconds(work, 1)  # warm-up
    return max(1, math.ceil(MIN_SECONDS / _seconds(work, 1)))


def _seconds(work: Callable[[], object], num_calls: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(num_calls):
        work()
    _synchronize()
    return (time.perf_counter() - start) / num_calls


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_bytes(kernel: TimedKernel) -> int | None:
    """Peak allocation of forward and backward together, beyond the memory in use before.

    Returns:
        Bytes, or None if this system cannot tell.
    """
    on_gpu = torch.cuda.is_available()

    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            # Memory that the allocator kept from earlier calls would hide what this one needs.
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR_REFS.write_text("5")  # resets the high-water mark, VmHWM
            before = _status_bytes("VmRSS")
    except OSError:  # not Linux
        return None

    out = kernel.forward()
    kernel.backward()
    del out

    return (torch.cuda.max_memory_allocated() if on_gpu else _status_bytes("VmHWM")) - before


def _status_bytes(name: str) -> int:
    """Read a field of ``/proc/self/status`` in bytes."""
    return 1024 * next(
        int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name)
    )
