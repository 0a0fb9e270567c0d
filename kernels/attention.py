"""Block-causal attention: token i attends to token j iff floor(j/m) <= floor(i/m). One entry, several exact back ends behind it.

Back ends, all with a backward pass, none but the first with an S x T mask:

``reference``
    softmax over an explicit mask, any dtype: the truth that tests compare with.
``merge``
    stock causal flash attention and the triangle of each block, merged by log-sum-exp (merge.py): the path on CPUs.
``triton``
    the project's own kernels (triton_attention.py).
``flex``
    torch's FlexAttention over an analytic BlockMask (flex.py).
``fa4``
    flash-attn 4 with block-sparse tiles (fa4.py).

Legend: B batch, H query heads, G key-value heads, S queries, T keys, D width of a head.
"""

import importlib
import logging
import math
import os
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from bitlm_dist.kernels.call import Call, checked, seen_by_queries
from torch import Tensor

BACKENDS = ("fa4", "triton", "merge", "flex", "reference")  # the order in which ``auto`` asks them
# Of back ends that need more than torch: a package, and a CUDA device of at least this compute capability.
_PACKAGES = {"triton": ("triton", (8, 0)), "fa4": ("flash_attn.cute.interface", (9, 0))}
_FILES = {"triton": "triton_attention"}  # where a back end's module has another name
_modules: dict[str, ModuleType] = {}  # of back ends that were asked for: some take a second to load
_distrusted: dict[str, str] = {}  # back ends that failed a trial, and how
_log = logging.getLogger(__name__)


def available_backends() -> tuple[str, ...]:
    """Names that ``backend=`` accepts on this machine, in the order in which ``auto`` asks them."""
    return tuple(name for name in BACKENDS if missing(name) is None)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch.compile cannot look into imports
def missing(name: str) -> str | None:
    """What the back end ``name`` lacks on this machine; None if nothing, and then its module is loaded."""
    reason = _distrusted.get(name) or _missing(name)
    if reason is None and name not in _modules and name != "reference":
        _modules[name] = importlib.import_module(f"bitlm_dist.kernels.{_FILES.get(name, name)}")
    return reason


def distrust(name: str, reason: str) -> None:
    """Let this process use the back end ``name`` no more."""
    _log.warning("attention back end %s is not used, %s", name, reason)
    _distrusted[name] = reason


@cache
def _missing(name: str) -> str | None:
    if name not in _PACKAGES:
        return None
    package, least = _PACKAGES[name]
    if name != "triton" or os.environ.get("TRITON_INTERPRET") != "1":
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < least:
            return f"the GPU has compute capability {major}.{minor}, it needs {least[0]}.{least[1]}"
    try:
        importlib.import_module(package)
    except Exception as error:  # of a package, whatever ails it
        return f"{package} cannot be imported: {error}"
    return None


def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    document_ids: Tensor | None = None,
    document_bounds: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention with full sight inside a block and causal sight across blocks (paper, section 3.2); differentiable.

    Args:
        q: [B, H, S, D], any floating-point dtype that the back end takes. With T > S keys the queries are the last S positions.
        k: [B, G, T, D], H a multiple of G (grouped-query attention).
        v: [B, G, T, D].
        block: m >= 1, tokens a block. T - S must be a multiple of it; the last block may be incomplete.
        document_ids: [B, T] integers; a token sees only its own document. A document is a run of equal ids: the same id after
            another one is another document. None: one document.
        document_bounds: what :func:`~bitlm_dist.kernels.bounds_of_documents` makes of them, to be computed once for all layers.
        scale: factor on the scores, positive, 1/sqrt(D) by default.
        backend: one of :func:`available_backends`, or ``auto``: the first of them that takes these arguments.

    Returns:
        [B, H, S, D] in the dtype of q.

    Raises:
        ValueError: an argument does not fit, or not this back end; the message names it, its value, and which back end takes it.
    """
    call = checked(q, k, v, block, document_ids, document_bounds, scale)
    return attend(call, backend)


def attend(call: Call, backend: str = "auto") -> Tensor:
    """See :func:`block_causal_attention`."""
    name = choose(call, backend)
    out: Tensor = _reference(call) if name == "reference" or not call.q.numel() else _modules[name].attention(call)
    return out


def choose(call: Call, backend: str = "auto") -> str:
    """Name of the back end that runs this call; ValueError where a forced one is not here or does not take it."""
    if backend == "auto":
        name = next(_takers(call))
        _announce(name, call.q.device.type, str(call.q.dtype), call.q.shape[3])
        return name
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} does not exist: choose from {('auto', *available_backends())}")
    reason = missing(backend)
    if reason is not None:
        raise ValueError(f"attention backend {backend!r} is not available here: {reason}; choose from {available_backends()}")
    reason = refusal(backend, call)
    if reason is not None:
        raise ValueError(f"attention backend {backend!r}: {reason}; {', '.join(_takers(call))} would take it")
    return backend


def refusal(name: str, call: Call) -> str | None:
    """Why a back end that is here does not take this call; None if it does."""
    reason: str | None = None if name == "reference" else _modules[name].unsupported(call)
    return reason


def _takers(call: Call) -> Iterator[str]:
    return (name for name in BACKENDS if missing(name) is None and refusal(name, call) is None)


@cache  # so that every choice is said once
def _announce(name: str, device: str, dtype: str, width: int) -> None:
    words = f"block-causal attention on {device}, {dtype}, heads of width {width}: back end {name}"
    if name == "reference":
        _log.warning("%s, whose memory grows with the square of the length: no other takes such arguments", words)
    else:
        _log.info(words)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """A few new tokens of each row against its key-value cache; as :func:`block_causal_attention`, without gradient in mind.

    Memory-bound, so it is torch's fused attention whatever the back end of training: without a mask where the new tokens see
    all keys, else with one of S x T bits a row.

    Args:
        q: [B, H, S, D], the last S tokens of each row.
        k: [B, G, T, D], the cache; that of the new tokens included.
        v: [B, G, T, D].
        block: m; the tokens before the new ones fill whole blocks.
        lengths: int [B], keys of each row that count, S <= length <= T; what follows them must be finite. None: all T.
        scale: factor on the scores, 1/sqrt(D) by default.

    Returns:
        [B, H, S, D].
    """
    new, grouped = q.shape[2], q.shape[1] != k.shape[1]
    if lengths is None:
        checked(q, k, v, block, scale=scale)
        if new <= block:
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        lengths = torch.full((1,), k.shape[2], device=q.device)
    elif lengths.shape != q.shape[:1] or lengths.device != q.device:
        raise ValueError(f"lengths {(*lengths.shape,)} on {lengths.device}: expected [B] = {(*q.shape[:1],)} on {q.device}")
    last = lengths.view(-1, 1)
    place = last - new + torch.arange(new, device=q.device)  # [B or 1, S]
    high = torch.minimum((place // block + 1) * block, last)
    mask = torch.arange(k.shape[2], device=q.device) < high[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _reference(call: Call) -> Tensor:
    group = call.q.shape[1] // call.k.shape[1]
    k, v = call.k.repeat_interleave(group, 1), call.v.repeat_interleave(group, 1)
    low, high = (x[:, None, :, None] for x in seen_by_queries(call))
    at = torch.arange(k.shape[2], device=k.device)
    scores = (call.q @ k.mT * call.scale).masked_fill((at < low) | (at >= high), -math.inf)
    return scores.softmax(-1) @ v
