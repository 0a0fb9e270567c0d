"""Elementwise code that torch.compile fuses into one kernel, behind a single switch that is off by default.

On a GPU such a stretch is bound by its launches, dozens of kernels of a few microseconds each; on a CPU it is as fast as written
(docs/kernels.md). A region takes and returns tensors and plain values. It must compile as a single graph; a graph break is
an error.
"""

import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from bitlm_dist.errors import UserError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

log = logging.getLogger(__name__)
VARIANTS = 64

_backend: str | None = None  # of torch.compile; None: regions run as they are written


def region(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: run ``function`` compiled while :func:`compiled_regions` says so."""

    @functools.cache
    def compiled(backend: str) -> Callable[Arguments, Result]:
        # heads differ in depth, draws, gradient or none: more variants of a region than torch allows of a function
        torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
        return torch.compile(function, fullgraph=True, backend=backend)

    @functools.wraps(function)
    def run(*arguments: Arguments.args, **names: Arguments.kwargs) -> Result:
        if _backend is None or torch.compiler.is_compiling():
            return function(*arguments, **names)
        # Sizes are variables from the first call on: a run that is resumed runs the very kernels of one that never stopped.
        for x in (*arguments, *names.values()):
            if isinstance(x, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(x, tuple(range(x.dim() - 1)))
        return compiled(_backend)(*arguments, **names)

    return run


def compiles(choice: str, device: torch.device) -> bool:
    """Whether ``training.compile`` = ``choice`` compiles on this machine: ``auto`` does on a GPU where compiling works.

    Raises:
        UserError: ``always``, and there is no compiler, or it fails.
    """
    names = (
        (os.environ.get("CC", "cc"), "gcc", "clang") if device.type == "cuda" else (os.environ.get("CXX", "c++"), "g++", "clang++")
    )
    there = any(shutil.which(name) for name in names)
    if choice == "always" and not there:
        raise UserError(f"training.compile = always: no compiler, looked for {', '.join(names)}: install one, or use never")
    if not there or not (choice == "always" or (choice == "auto" and device.type == "cuda")):
        return False

    problem = _trial(device)
    if problem is None:
        return True
    if choice == "always":
        raise UserError(f"training.compile = always: {problem}: fix it, or use never")
    log.warning("regions of the head run as they are written, which is slower: %s", problem)
    return False


@functools.cache
def _trial(device: torch.device) -> str | None:
    """Why nothing can be compiled here: a compiler may lack headers, a driver may be too old; None: it works."""

    def curve(x: torch.Tensor) -> torch.Tensor:
        return x.tanh().square() + 1

    try:
        x = torch.linspace(-1, 1, 64, device=device, requires_grad=True)
        torch.compile(curve, fullgraph=True)(x).sum().backward()
    except Exception as error:  # whatever ails the compiler
        return f"torch.compile fails on {device.type} ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return None


@contextmanager
def compiled_regions(backend: str | None = "inductor") -> Iterator[None]:
    """While open, regions are compiled by ``backend`` of torch.compile; None: they are not."""
    global _backend
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


@contextmanager
def no_torch_compile() -> Iterator[None]:
    """While open, ``torch.compile`` returns functions as they are.

    For imports of libraries that decorate functions which we never call: the first decorator loads the whole compiler, which takes
    seconds in every process.
    """

    def plain(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        return plain if function is None else function

    torch_compile = torch.compile
    torch.compile = plain  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = torch_compile
