"""The one way in which tests start several processes: gloo ranks on this machine, each calling a function beside this file.

Ranks are forked from a server that has imported torch, Megatron-core and DeepSpeed once, which costs more than most tests. The
server ends with the test process and each rank with the server, so nothing is left of a run that was cut short.
"""

import importlib
import importlib.abc
import importlib.machinery
import multiprocessing
import os
import pickle
import socket
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bitlm_dist.processes import die_with

HERE = Path(__file__).parent
# What takes long to import, and nothing that computes: a thread of the server would be missing in every rank.
PRELOADED = ["torch", "pytest", "preloaded"]
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read by the libraries when the server loads them

_context = multiprocessing.get_context("forkserver")


def start_rank(
    function: str, *arguments: Any, environment: Mapping[str, str], log: Path, result: Path | None = None
) -> ForkServerProcess:
    """Call a function in a process of its own, one of a job or alone.

    Args:
        function: ``module.name``; the module may be one beside this file.
        environment: variables for it, beside those of this process.
        log: file that everything it prints is appended to.
        result: file for what it returned, pickled.

    Returns:
        The process, started.
    """
    _start_server()
    process = _context.Process(target=_rank, args=(function, arguments, {**os.environ, **THREADS, **environment}, log, result))
    process.start()
    return process


def run_ranks(world: int, module: str, name: str, *arguments: Any, folder: Path, timeout: float = 900) -> list[Any]:
    """Call ``module.name(*arguments)`` in ``world`` ranks of one job.

    Args:
        module: beside this file.
        folder: empty; holds results and logs.
        timeout: seconds, after which all are killed.

    Returns:
        What each rank returned.
    """
    processes = start_job(world, f"{module}.{name}", *arguments, folder=folder)
    end = time.monotonic() + timeout
    try:
        # a rank that failed leaves the others waiting for it
        while None in (codes := [p.exitcode for p in processes]) and not any(codes) and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.join()

    for rank, code in enumerate(codes):
        state = "did not end" if code is None else f"ended with {code}"
        assert code == 0 or (code is None and any(codes)), f"rank {rank} {state}:\n" + (folder / f"log.{rank}").read_text()[-3000:]
    return [pickle.loads((folder / f"result.{rank}").read_bytes()) for rank in range(world)]


def start_job(
    world: int, function: str, *arguments: Any, folder: Path, environment: Mapping[str, str] | None = None
) -> list[ForkServerProcess]:
    """Start the ranks of a job that find each other, with logs and results in ``folder``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    job = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environment or {})}
    return [
        start_rank(
            function,
            *arguments,
            environment={**job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            log=folder / f"log.{rank}",
            result=folder / f"result.{rank}",
        )
        for rank in range(world)
    ]


def chosen(request: pytest.FixtureRequest, cases: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a module's cases that its selected tests name in their parameter ``case``: a fixture need not run the others."""
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = {test.callspec.params.get("case") for test in tests}
    return {name: case for name, case in cases.items() if name in names}


def in_rings(cases: Iterable[str], quick: Collection[str], slow: Collection[str]) -> list[Any]:
    """Parameters of a test: all cases, those in ``slow`` with the mark of that name, those in neither with the mark `long`."""
    cases = list(cases)
    assert {*quick, *slow} <= {*cases}, f"no such case: {({*quick, *slow}) - {*cases}}"
    marks = {case: [] if case in quick else [pytest.mark.slow if case in slow else pytest.mark.long] for case in cases}
    return [pytest.param(case, marks=marks[case]) for case in cases]


def command(words: list[str]) -> None:
    """What a rank of a job of `bitlm` does: the whole command, from its words to its exit code."""
    from bitlm_dist.__main__ import main

    sys.argv = ["bitlm", *words]
    main()


# --- the server ---------------------------------------------------------------------------------------------------------------


def _start_server() -> None:
    """Start the server unless it runs; the variables that libraries read once must be there by then."""
    # A process that has asked for GPUs cannot use them once it is forked, and DeepSpeed asks while it is imported.
    preloaded = PRELOADED if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else []
    with _variables({**os.environ, **THREADS, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}):
        _context.set_forkserver_preload(preloaded)
        forkserver.ensure_running()


@contextmanager
def _variables(values: Mapping[str, str]):
    old = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(old)


def _rank(function: str, arguments: tuple[Any, ...], environment: Mapping[str, str], log: Path, result: Path | None) -> None:
    die_with(os.getppid())
    os.environ.clear()
    os.environ.update(environment)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    _hide_deepspeed()
    # a tracker of its own, as a process has: the server's would take what a killed rank leaves for its own
    tracker: Any = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None

    module, _, name = function.rpartition(".")
    returned = getattr(importlib.import_module(module), name)(*arguments)
    if result is not None:
        result.write_bytes(pickle.dumps(returned))
    if (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _hide_deepspeed() -> None:
    """Let DeepSpeed be imported again, at no cost, by whoever imports it: tests ask which ranks do."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "deepspeed"}

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
            return importlib.machinery.ModuleSpec(name, self) if name in hidden else None

        def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
            return hidden[spec.name]

        def exec_module(self, module: ModuleType) -> None:
            sys.modules.update(hidden)

    if hidden:
        sys.meta_path.insert(0, Finder())
