"""Elementwise regions fused by torch.compile, behind one global switch (off by default).

On a GPU such a region is bound by kernel launches, dozens of kernels of a few microseconds each.
On a CPU it is as fast as written (docs/kernels.md). A region takes and returns tensors and plain
values. It must compile as a single graph; a graph break is an error.
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

_log = logging.getLogger(__name__)
RECOMPILE_LIMIT = 64  # variants of a region: heads differ in depth, noise samples and gradients

_backend: str | None = None  # torch.compile's backend; None: regions run eagerly


def compiled_region(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: compile ``function`` while :func:`enable_compiled_regions` is active."""

    @functools.wraps(function)
    def run(*arguments: Arguments.args, **names: Arguments.kwargs) -> Result:
        if _backend is None or torch.compiler.is_compiling():
            return function(*arguments, **names)

        # Sizes are dynamic from the first call on, so that a resumed run gets the same kernels as
        # one that was never interrupted.

        for x in (*arguments, *names.values()):
            if isinstance(x, torch.Tensor):
                torch._dynamo.maybe_mark_dynamic(x, tuple(range(x.dim() - 1)))
        return _compiled(function, _backend)(*arguments, **names)

    return run


@functools.cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Compile a region once per backend. On fake GPUs, ``planning/`` replaces this."""
    # torch's default allows fewer variants of a function than a region needs
    torch._dynamo.config.recompile_limit = max(
        RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit
    )
    return torch.compile(function, fullgraph=True, backend=backend)


def should_compile(choice: str, device: torch.device) -> bool:
    """Resolve ``training.compile`` on this machine.

    Args:
        choice: ``auto``, ``always`` or ``never``; ``auto`` compiles on a GPU if that works.
        device: where the regions run.

    Returns:
        True if regions are to be compiled.

    Raises:
        UserError: ``choice`` is ``always``, and there is no compiler or it fails.
    """
    # Inductor's GPU kernels need a C compiler for their launchers, its CPU kernels a C++ compiler.
    names = (
        (os.environ.get("CC", "cc"), "gcc", "clang")
        if device.type == "cuda"
        else (os.environ.get("CXX", "c++"), "g++", "clang++")
    )
    has_compiler = any(shutil.which(name) for name in names)
    if choice == "always" and not has_compiler:
        raise UserError(
            f"training.compile = always: no compiler, looked for {', '.join(names)}: "
            "install one, or use never"
        )
    if not has_compiler or not (choice == "always" or (choice == "auto" and device.type == "cuda")):
        return False

    problem = _compile_failure_reason(device)
    if problem is None:
        return True
    if choice == "always":
        raise UserError(f"training.compile = always: {problem}: fix it, or use never")

    _log.warning("regions run as they are written, which is slower: %s", problem)
    return False


@functools.cache
def _compile_failure_reason(device: torch.device) -> str | None:
    """Compile a small function on ``device`` to find out whether compilation works.

    A compiler may lack headers, a driver may be too old.

    Returns:
        The reason of the failure; None if it works.
    """

    def curve(x: torch.Tensor) -> torch.Tensor:
        return x.tanh().square() + 1

    try:
        x = torch.linspace(-1, 1, 64, device=device, requires_grad=True)
        torch.compile(curve, fullgraph=True)(x).sum().backward()
    except Exception as error:  # the compiler raises errors of many kinds
        message = " ".join(str(error).split())[:200]
        return f"torch.compile fails on {device.type} ({type(error).__name__}: {message})"
    return None


@contextmanager
def enable_compiled_regions(backend: str | None = "inductor") -> Iterator[None]:
    """Context manager within which regions are compiled.

    Args:
        backend: backend of torch.compile; None: regions run eagerly.
    """
    global _backend
    before = _backend
    _backend = backend
    try:
        yield
    finally:
        _backend = before


@contextmanager
def no_torch_compile() -> Iterator[None]:
    """Context manager within which ``torch.compile`` is the identity.

    For imports of libraries that decorate functions which are never called here: the first
    decorator would load the whole compiler, which takes seconds in every process.
    """

    def plain(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        return plain if function is None else function

    torch_compile = torch.compile
    torch.compile = plain  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = torch_compile
