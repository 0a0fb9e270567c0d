"""Block-causal attention: token i attends to token j iff floor(j/m) <= floor(i/m).

One entry point for several exact backends. All of them have a backward pass, and only ``reference``
builds an S x T mask:

``reference``
    softmax over an explicit mask, in any dtype: the ground truth of the tests.
``merge``
    causal flash attention from torch plus the upper triangle of each block, merged by log-sum-exp
    (lse_merge.py): the backend for CPUs.
``triton``
    Triton kernels of this project (triton_attention.py).
``flex``
    torch's FlexAttention over an analytic BlockMask (flex.py).
``fa4``
    flash-attn 4 with block-sparse tiles (fa4.py).

Legend: B batch, H query heads, G key-value heads, S queries, T keys, D head dimension, m tokens per
block.
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
from torch import Tensor

from bitlm_dist.kernels.attention_inputs import AttentionInputs, validate_inputs, visible_key_ranges

BACKENDS = ("fa4", "triton", "merge", "flex", "reference")  # in the order of preference of ``auto``

# what some backends need besides torch: a package, and a minimum CUDA compute capability
_REQUIREMENTS = {"triton": ("triton", (8, 0)), "fa4": ("flash_attn.cute.interface", (9, 0))}
# where a backend's module is not named after it
_MODULE_NAMES = {"triton": "triton_attention", "merge": "lse_merge"}

# Backends are imported on first use, as some take a second to load.
_modules: dict[str, ModuleType] = {}
_disabled: dict[str, str] = {}  # backends that failed the self-check, and the reason
_log = logging.getLogger(__name__)


def available_backends() -> tuple[str, ...]:
    """Names that ``backend=`` accepts on this machine, in the order of preference of ``auto``."""
    return tuple(name for name in BACKENDS if unavailable_reason(name) is None)


def unavailable_reason(name: str) -> str | None:
    """Reason why a backend is unavailable on this machine; None if it is available.

    An available backend's module is imported on the first call.
    """
    reason = _disabled.get(name) or _find_unavailable_reason(name)
    if reason is None and name not in _modules and name != "reference":
        _modules[name] = importlib.import_module(
            f"bitlm_dist.kernels.{_MODULE_NAMES.get(name, name)}"
        )
    return reason


# torch.compile cannot trace imports. This is what torch.compiler.assume_constant_result does, which
# loads the whole compiler first: a second in every process, also where nothing is compiled.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def disable_backend(name: str, reason: str) -> None:
    """Make a backend unavailable for the rest of this process."""
    _log.warning("attention backend %s is not used, %s", name, reason)
    _disabled[name] = reason


@cache
def _find_unavailable_reason(name: str) -> str | None:
    if name not in _REQUIREMENTS:
        return None
    package, min_capability = _REQUIREMENTS[name]

    # Triton's interpreter needs no GPU.
    if name != "triton" or os.environ.get("TRITON_INTERPRET") != "1":
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) < min_capability:
            return (
                f"the GPU has compute capability {major}.{minor}, "
                f"the backend needs {min_capability[0]}.{min_capability[1]}"
            )

    # A broken package may raise anything on import, not only ImportError.
    try:
        importlib.import_module(package)
    except Exception as error:
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
    """Attention that is full within a block and causal across blocks (paper, section 3.2).

    Differentiable with respect to q, k and v.

    Args:
        q: [B, H, S, D] in any floating-point dtype that the backend supports. If T > S, the queries
            are the last S positions.
        k: [B, G, T, D], H a multiple of G (grouped-query attention).
        v: [B, G, T, D].
        block: m >= 1, tokens per block. T - S must be a multiple of it; the last block may be
            incomplete.
        document_ids: integers [B, T]; a token attends to its own document only. A document is a
            run of equal ids: an id that recurs after a different one starts a new document. None:
            one document per row.
        document_bounds: result of :func:`~bitlm_dist.kernels.bounds_of_documents`, which replaces
            ``document_ids``, so that it is computed once for all layers.
        scale: positive factor on the scores; defaults to 1/sqrt(D).
        backend: one of :func:`available_backends`, or ``auto`` for the first of them that supports
            these arguments.

    Returns:
        [B, H, S, D] in the dtype of q.

    Raises:
        ValueError: an argument is invalid, or the backend does not support it. The message names
            the argument, its value and the backends that support it.
    """
    inputs = validate_inputs(q, k, v, block, document_ids, document_bounds, scale)
    return dispatch(inputs, backend)


def dispatch(inputs: AttentionInputs, backend: str = "auto") -> Tensor:
    """Run :func:`block_causal_attention` on validated inputs."""
    name = select_backend(inputs, backend)

    # the reference handles empty inputs, too: no kernel to launch
    out: Tensor = (
        _reference(inputs)
        if name == "reference" or not inputs.q.numel()
        else _modules[name].attention(inputs)
    )
    return out


def select_backend(inputs: AttentionInputs, backend: str = "auto") -> str:
    """Name of the backend that runs this call.

    Raises:
        ValueError: the named backend does not exist, is unavailable here, or does not support the
            call.
    """
    if backend == "auto":
        name = next(_supporting_backends(inputs))
        _log_backend_once(name, inputs.q.device.type, str(inputs.q.dtype), inputs.q.shape[3])
        return name

    # no silent fallback if the caller names a backend
    if backend not in BACKENDS:
        raise ValueError(
            f"attention backend {backend!r} does not exist: "
            f"choose from {', '.join(('auto', *available_backends()))}"
        )

    reason = unavailable_reason(backend)
    if reason is not None:
        raise ValueError(
            f"attention backend {backend!r} is not available here: {reason}; "
            f"choose from {', '.join(available_backends())}"
        )

    reason = unsupported_reason(backend, inputs)
    if reason is not None:
        raise ValueError(
            f"attention backend {backend!r}: {reason}; "
            f"{', '.join(_supporting_backends(inputs))} would take it"
        )
    return backend


def unsupported_reason(name: str, inputs: AttentionInputs) -> str | None:
    """Reason why an available backend does not support this call; None if it does."""
    reason: str | None = None if name == "reference" else _modules[name].unsupported_reason(inputs)
    return reason


def _supporting_backends(inputs: AttentionInputs) -> Iterator[str]:
    return (
        name
        for name in BACKENDS
        if unavailable_reason(name) is None and unsupported_reason(name, inputs) is None
    )


@cache  # logs each choice once
def _log_backend_once(name: str, device: str, dtype: str, head_dim: int) -> None:
    words = f"block-causal attention on {device}, {dtype}, head dim {head_dim}: backend {name}"
    if name == "reference":
        _log.warning(
            "%s, whose memory grows with the square of the length: no other supports this call",
            words,
        )
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
    """Attention of the newest tokens of each row over the row's key-value cache, for inference.

    There is no choice of backend: decoding is memory-bound, so torch's fused attention suffices,
    without a mask if the new tokens attend to all keys, else with a boolean mask of S x T per row.

    Args:
        q: [B, H, S, D], the last S tokens of each row.
        k: [B, G, T, D], the cache, including the new tokens.
        v: [B, G, T, D].
        block: m; the tokens before the new ones must be full blocks.
        lengths: int [B], number of valid keys per row, S <= length <= T. Values after them are
            masked, but must be finite. None: all T keys are valid.
        scale: factor on the scores; defaults to 1/sqrt(D).

    Returns:
        [B, H, S, D].

    Raises:
        ValueError: an argument is invalid.
    """
    num_new = q.shape[2]
    grouped = q.shape[1] != k.shape[1]

    if lengths is None:
        validate_inputs(q, k, v, block, scale=scale)
        # new tokens of a single block attend to every key
        if num_new <= block:
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        lengths = torch.full((1,), k.shape[2], device=q.device)
    elif lengths.shape != q.shape[:1] or lengths.device != q.device:
        raise ValueError(
            f"lengths {(*lengths.shape,)} on {lengths.device}: "
            f"expected [B] = {(*q.shape[:1],)} on {q.device}"
        )

    # a token attends up to the end of its block, but not past the length of its row
    last = lengths.view(-1, 1)
    positions = last - num_new + torch.arange(num_new, device=q.device)  # [B or 1, S]
    high = torch.minimum((positions // block + 1) * block, last)
    mask = torch.arange(k.shape[2], device=q.device) < high[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _reference(inputs: AttentionInputs) -> Tensor:
    group = inputs.q.shape[1] // inputs.k.shape[1]
    k = inputs.k.repeat_interleave(group, 1)
    v = inputs.v.repeat_interleave(group, 1)

    low, high = (x[:, None, :, None] for x in visible_key_ranges(inputs))
    at = torch.arange(k.shape[2], device=k.device)
    scores = (inputs.q @ k.mT * inputs.scale).masked_fill((at < low) | (at >= high), -math.inf)
    return scores.softmax(-1) @ v
