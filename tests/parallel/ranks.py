"""Start jobs of several gloo ranks on this machine, which call a function beside this file.

This is the only way in which tests start ranks. Ranks are forked from a server that has imported
torch, Megatron-core and DeepSpeed once, which costs more than most tests. The server ends with the
test process and each rank with the server, so no process survives a run that was cut short.
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

from bitlm_dist.processes import die_with_parent

HERE = Path(__file__).parent
# Modules that take long to import. They must not compute anything: forked ranks have no copies of
# the server's threads.
PRELOADED = ["torch", "pytest", "preloaded"]
THREADS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}  # read by the libraries when the server loads them

_context = multiprocessing.get_context("forkserver")


def start_rank(
    function: str,
    *arguments: Any,
    environment: Mapping[str, str],
    log: Path,
    result: Path | None = None,
) -> ForkServerProcess:
    """Call a function in a new process, as a rank of a job or alone.

    Args:
        function: ``module.name``; the module may be one beside this file.
        environment: variables to add to those of this process.
        log: file to which its output is appended.
        result: file for its pickled return value.

    Returns:
        The started process.
    """
    _start_server()
    process = _context.Process(
        target=_rank_main,
        args=(function, arguments, {**os.environ, **THREADS, **environment}, log, result),
    )
    process.start()
    return process


def run_ranks(
    world_size: int, module: str, name: str, *arguments: Any, folder: Path, timeout: float = 900
) -> list[Any]:
    """Call ``module.name(*arguments)`` in ``world_size`` ranks of one job.

    Args:
        module: module beside this file.
        folder: empty folder for results and logs.
        timeout: seconds after which all ranks are killed.

    Returns:
        The return value of each rank.
    """
    processes = start_job(world_size, f"{module}.{name}", *arguments, folder=folder)
    end = time.monotonic() + timeout
    try:
        # a rank that failed leaves the others waiting for it
        while (
            None in (codes := [p.exitcode for p in processes])
            and not any(codes)
            and time.monotonic() < end
        ):
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.join()

    for rank, code in enumerate(codes):
        ending = "did not end" if code is None else f"ended with {code}"
        assert code == 0 or (code is None and any(codes)), (
            f"rank {rank} {ending}:\n" + (folder / f"log.{rank}").read_text()[-3000:]
        )
    return [pickle.loads((folder / f"result.{rank}").read_bytes()) for rank in range(world_size)]


def start_job(
    world_size: int,
    function: str,
    *arguments: Any,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> list[ForkServerProcess]:
    """Start the ranks of one job, with logs and results in ``folder``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    job = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **(environment or {}),
    }
    return [
        start_rank(
            function,
            *arguments,
            environment={**job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            log=folder / f"log.{rank}",
            result=folder / f"result.{rank}",
        )
        for rank in range(world_size)
    ]


def selected_cases(request: pytest.FixtureRequest, cases: Mapping[str, Any]) -> dict[str, Any]:
    """The cases of a module that its selected tests name in their parameter ``case``.

    A fixture need not run the others.
    """
    tests = [
        item
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    names = {test.callspec.params.get("case") for test in tests}
    return {name: case for name, case in cases.items() if name in names}


def mark_by_duration(
    cases: Iterable[str], quick: Collection[str], slow: Collection[str]
) -> list[Any]:
    """Parameters of a test: all cases, with marks by their duration.

    Those in ``quick`` have no mark, those in ``slow`` the mark `slow`, all others the mark `long`.
    """
    cases = list(cases)
    assert {*quick, *slow} <= {*cases}, f"no such case: {({*quick, *slow}) - {*cases}}"
    marks = {
        case: [] if case in quick else [pytest.mark.slow if case in slow else pytest.mark.long]
        for case in cases
    }
    return [pytest.param(case, marks=marks[case]) for case in cases]


def run_command_line(words: list[str]) -> None:
    """Run a `bitlm` command on a rank, from its words to its exit code."""
    from bitlm_dist.__main__ import main

    sys.argv = ["bitlm", *words]
    main()


# --- the server -----------------------------------------------------------------------------------


def _start_server() -> None:
    """Start the server unless it runs, with the variables that libraries read only once."""
    # A process that has queried GPUs cannot use them after a fork, and importing DeepSpeed queries
    # them.
    preloaded = PRELOADED if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else []
    with _environment(
        {**os.environ, **THREADS, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    ):
        _context.set_forkserver_preload(preloaded)
        forkserver.ensure_running()


@contextmanager
def _environment(values: Mapping[str, str]):
    old = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(old)


def _rank_main(
    function: str,
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    log: Path,
    result: Path | None,
) -> None:
    die_with_parent(os.getppid())
    os.environ.clear()
    os.environ.update(environment)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    _forget_deepspeed_import()
    # its own resource tracker, as every process has: the server's would adopt what a killed rank
    # leaves behind
    tracker: Any = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None

    module, _, name = function.rpartition(".")
    returned = getattr(importlib.import_module(module), name)(*arguments)
    if result is not None:
        result.write_bytes(pickle.dumps(returned))
    if (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _forget_deepspeed_import() -> None:
    """Make DeepSpeed look as if it were not imported; importing it again costs nothing.

    Tests check which ranks import it.
    """
    hidden = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.partition(".")[0] == "deepspeed"
    }

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(
            self, name: str, path: object = None, target: object = None
        ) -> importlib.machinery.ModuleSpec | None:
            return importlib.machinery.ModuleSpec(name, self) if name in hidden else None

        def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
            return hidden[spec.name]

        def exec_module(self, module: ModuleType) -> None:
            sys.modules.update(hidden)

    if hidden:
        sys.meta_path.insert(0, Finder())
