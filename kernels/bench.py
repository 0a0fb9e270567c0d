"""Time and memory of the attentions, every back end in turn in one run beside what torch has; `bitlm bench` prints and draws it.

Attention is judged by FLOP/s on the exact mask, 4·D for each visible pair forward and 10·D backward, attention inside blocks by the
bytes that it must move: 4 numbers a token, head and column forward, 7 backward.

Legend: B batch, H query heads, G key-value heads, S sequence, D width of a head.
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
from bitlm_dist.kernels import attention, in_block
from bitlm_dist.kernels.call import Call, checked, seen_by_queries
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitlm_dist.errors import UserError

CAUSAL, DENSE, BLOCKS, COPY = "causal flash", "SDPA, dense mask", "SDPA of blocks", "copy"  # what torch has
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
MOST_SCORES = 2**29  # up to which the reference takes part unasked
LEAST_SECONDS = 0.02  # of a timed stretch: short calls are repeated


@dataclass(frozen=True)
class Shape:
    """What to measure: attention over the sequence, or inside its blocks (then H = G, and no documents)."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    block: int
    documents: int = 1  # of one row, of equal length
    dtype: str = "float32"


@dataclass(frozen=True)
class Side:
    """One way to compute it. Seconds are of one call, one entry a repeat; work is FLOPs or bytes of one call."""

    forward: list[float]
    backward: list[float]
    forward_work: float
    backward_work: float
    peak_bytes: int | None  # allocated at once beyond inputs, in forward and backward; None: not measured

    @property
    def total(self) -> float:
        """Median seconds of forward and backward."""
        return statistics.median(self.forward) + statistics.median(self.backward)

    @property
    def rates(self) -> tuple[float, float]:
        """Median work a second, forward and backward."""
        return self.forward_work / statistics.median(self.forward), self.backward_work / statistics.median(self.backward)


class Contender(NamedTuple):
    """What is timed, and the work of one call of each."""

    forward: Callable[[], Tensor]
    backward: Callable[[], object]
    forward_work: float
    backward_work: float


def bench_attention(shape: Shape, repeats: int, backends: Sequence[str] = ()) -> dict[str, Side]:
    """Block-causal attention by ``backends`` (default: all that train here), causal flash attention, and SDPA with a dense mask.

    Raises:
        UserError: a back end that is named does not take the shape.
    """
    counts = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = inputs = [_random((shape.batch, count, shape.length, shape.width), shape) for count in counts]
    at = torch.arange(shape.length, device=device_of())
    ids = (at * shape.documents // shape.length).expand(shape.batch, -1)
    call = checked(q, k, v, shape.block, document_ids=None if shape.documents == 1 else ids)
    scores = shape.batch * shape.heads * shape.length**2
    there = [name for name in attention.available_backends() if name != "reference" or scores <= MOST_SCORES]
    names = _chosen(backends, there, lambda name: attention.choose(call, name))
    low, high = (x[:, None, :, None] for x in seen_by_queries(call))
    grouped = shape.heads != shape.kv_heads
    dense = partial(F.scaled_dot_product_attention, attn_mask=(at >= low) & (at < high), enable_gqa=grouped)
    per_pair = shape.heads * shape.width
    pairs = per_pair * float((high - low).sum(dtype=torch.int64)) * shape.batch / len(low)
    causal = per_pair * shape.batch * shape.length * (shape.length + 1) / 2
    contenders = {name: _differentiated(partial(_attend, name, call), inputs, 4 * pairs, 10 * pairs) for name in names}
    contenders[CAUSAL] = _differentiated(partial(_causal_flash, grouped), inputs, 4 * causal, 10 * causal)
    contenders[DENSE] = _differentiated(dense, inputs, 4 * pairs, 10 * pairs)
    return _measured(contenders, repeats)


def bench_in_block(shape: Shape, repeats: int, backends: Sequence[str] = ()) -> dict[str, Side]:
    """Attention inside blocks by ``backends`` (default: all here), SDPA over a batch of blocks, and a copy of as many bytes.

    Raises:
        UserError: as :func:`bench_attention`.
    """
    blocks = shape.batch * shape.length // shape.block
    qkv = _random((blocks, shape.block, 3, shape.heads, shape.width), shape)
    names = _chosen(backends, in_block.BACKENDS, lambda name: _inside(name, qkv[:1]))
    part = blocks * shape.block * shape.heads * shape.width
    work = 4.0 * part * qkv.element_size(), 7.0 * part * qkv.element_size()
    contenders = {name: _differentiated(partial(_inside, name), [qkv], *work) for name in names}
    contenders[BLOCKS] = _differentiated(_inside_by_sdpa, [qkv], *work)
    source, target = (torch.randn(7 * part // 2, dtype=qkv.dtype, device=qkv.device) for _ in range(2))  # read and written: 7 parts
    copy = Contender(lambda: target[: 2 * part].copy_(source[: 2 * part]), lambda: target.copy_(source), *work)
    contenders[COPY] = copy
    return _measured(contenders, repeats)


def _chosen(named: Sequence[str], there: Sequence[str], attempt: Callable[[str], object]) -> list[str]:
    """The named back ends, or all that do not refuse."""
    taken = []
    for name in named or there:
        try:
            attempt(name)
        except ValueError as error:
            if named:
                raise UserError(str(error)) from None
        else:
            taken.append(name)
    return taken


def device_of() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _random(size: tuple[int, ...], shape: Shape) -> Tensor:
    return torch.randn(size, device=device_of()).to(getattr(torch, shape.dtype)).requires_grad_()


def _attend(name: str, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.attend(call.of(q, k, v), name)


def _causal_flash(grouped: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.is_cuda and q.dtype == torch.float32:  # flash takes none, and what does takes no grouped heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def _inside(name: str, qkv: Tensor) -> Tensor:
    return in_block.in_block_attention(qkv, qkv.shape[1], backend=name)


def _inside_by_sdpa(qkv: Tensor) -> Tensor:
    q, k, v = (x.transpose(-2, -3) for x in qkv.unbind(-3))
    return F.scaled_dot_product_attention(q, k, v)


def _differentiated(run: Callable[..., Tensor], inputs: Sequence[Tensor], forward_work: float, backward_work: float) -> Contender:
    out = run(*inputs)
    weight = torch.randn_like(out)
    return Contender(
        lambda: run(*inputs),
        lambda: torch.autograd.grad(out, inputs, weight, retain_graph=True),
        forward_work,
        backward_work,
    )


def _measured(contenders: Mapping[str, Contender], repeats: int) -> dict[str, Side]:
    """Every repeat takes all contenders in turn, after one that does not count."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contenders}
    calls = {name: [_calls(work) for work in contender[:2]] for name, contender in contenders.items()}
    for _ in range(repeats):
        for name, contender in contenders.items():
            for taken, work, count in zip(times[name], contender[:2], calls[name], strict=True):
                taken.append(_seconds(work, count))
    return {name: Side(*times[name], *contender[2:], _peak_bytes(contender)) for name, contender in contenders.items()}


def _calls(work: Callable[[], object]) -> int:
    """How many fill a stretch that a clock can measure."""
    _seconds(work, 1)
    return max(1, math.ceil(LEAST_SECONDS / _seconds(work, 1)))


def _seconds(work: Callable[[], object], calls: int) -> float:
    _wait()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    _wait()
    return (time.perf_counter() - began) / calls


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_bytes(contender: Contender) -> int | None:
    """Held at once, with what forward leaves for backward, beyond what was held before."""
    on_gpu = torch.cuda.is_available()
    try:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed and the allocator kept would hide what this one needs
            CLEAR.write_text("5")  # the high-water mark begins anew
            before = _resident("VmRSS")
    except OSError:  # not Linux
        return None
    out = contender.forward()
    contender.backward()
    del out
    return (torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")) - before


def _resident(name: str) -> int:
    """Bytes of a line of the process's status."""
    return 1024 * next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))
