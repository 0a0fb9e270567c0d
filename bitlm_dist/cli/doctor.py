"""`bitlm doctor`: installed packages, usable backends, and the benefit of each missing piece.

torch is imported while it runs, after the first table, and the time of that import is one of the
findings: on a network file system it is most of the start of every command.
"""

import importlib
import importlib.util
import os
import pkgutil
import platform
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from bitlm_dist.cli.console import print_table
from bitlm_dist.cli.progress import work_progress
from bitlm_dist.cpu_contention import CpuContention
from bitlm_dist.cpu_threads import NUM_THREADS, SPIN_COUNT, WAIT_POLICY
from bitlm_dist.disks import (
    SHARED_MEMORY,
    format_bytes,
    free_bytes,
    shared_memory_problem,
    temp_dir_problem,
)
from bitlm_dist.errors import UserError
from bitlm_dist.formatting import plural
from bitlm_dist.package_versions import PACKAGES, package_version
from bitlm_dist.processes import handling_signal
from bitlm_dist.registry import HEAD_PARTITIONERS, OPTIMIZERS
from bitlm_dist.strict_json import to_json

# Backends of model.backbone.attention.
ATTENTION_BACKENDS = {
    "fa4": "flash-attn 4 with tile lists",
    "triton": "the project's own kernels",
    "merge": "torch's flash attention plus the triangles of the blocks; on CPUs too",
    "flex": "torch's FlexAttention with tile lists; on a CPU without gradients",
    "reference": "a dense mask, for comparison",
}
WATCH_SECONDS = 0.5  # how long other programs are watched, at least
IMPORT_TORCH = "import torch"


class Finding(NamedTuple):
    """One line of the report; the note is the version, or the benefit of installing it."""

    name: str
    is_available: bool
    note: str


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # finding a submodule imports its package, which may be broken in any way
        return False


def _deepspeed() -> Finding:
    try:
        pkgutil.resolve_name(HEAD_PARTITIONERS["deepspeed"]).check_installed()
    except UserError as error:
        return Finding("DeepSpeed ZeRO", False, str(error))
    return Finding("DeepSpeed ZeRO", True, "parallel.head.engine = deepspeed, stages 0 to 3")


def _optional_package(name: str, module: str, distribution: str, brings: str) -> Finding:
    """Look for a package; ``brings`` is the note if it is not installed."""
    version = package_version(distribution)
    if _importable(module):
        return Finding(name, True, version or "of unknown version")
    if version:
        return Finding(name, False, f"{version} is installed, but cannot be imported")
    return Finding(name, False, brings)


def _transformer_engine() -> Finding:
    return _optional_package(
        "Transformer Engine",
        "transformer_engine.pytorch",
        "transformer-engine",
        "fused layers and FP8 for the backbone: pip install 'bitlm-dist[te]' beside CUDA",
    )


def _flash_attention() -> Finding:
    for module, distribution in (("flash_attn.cute", "flash-attn-4"), ("flash_attn", "flash-attn")):
        if _importable(module) and package_version(distribution):
            return Finding("flash-attn", True, f"{distribution} {package_version(distribution)}")

    return Finding(
        "flash-attn",
        False,
        "faster block-causal attention on GPUs: pip install 'bitlm-dist[fa4]' beside CUDA",
    )


def _wandb() -> Finding:
    return _optional_package(
        "Weights & Biases",
        "wandb",
        "wandb",
        "logging.wandb_project: pip install 'bitlm-dist[wandb]'",
    )


def _free_cores(busy_cores: CpuContention) -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0))
    warning = busy_cores.warning(torch.get_num_threads())
    return Finding(
        "free cores",
        warning is None,
        warning or f"{max(0.0, cores - busy_cores.num_cores_used_by_others()):.1f} of {cores}",
    )


def _openmp() -> Finding:
    variables = [
        f"{name}={os.environ[name]}"
        for name in (NUM_THREADS, WAIT_POLICY, SPIN_COUNT)
        if name in os.environ
    ]
    return Finding("OpenMP", bool(variables), " ".join(variables) or "as its library chooses")


def _device() -> Finding:
    import torch

    from bitlm_dist.parallel.device import find_device, warning_of_unused_gpus

    try:
        find_device(os.environ)
    except UserError as error:
        return Finding("device", False, str(error))

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return Finding(
            "device",
            True,
            f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, NCCL",
        )

    # a GPU that this build of torch cannot use
    warning = warning_of_unused_gpus()
    return Finding(
        "device",
        warning is None,
        warning
        or f"CPU, {plural(os.cpu_count() or 1, 'core')}, "
        f"{plural(torch.get_num_threads(), 'thread')}, gloo",
    )


def _shared_memory() -> Finding:
    problem = shared_memory_problem()
    return Finding(
        "shared memory",
        not problem,
        problem or f"{format_bytes(free_bytes(SHARED_MEMORY))} free in {SHARED_MEMORY}",
    )


def _temp_dir() -> Finding:
    problem = temp_dir_problem()
    if problem:
        return Finding("temporary files", False, problem)

    return Finding(
        "temporary files",
        True,
        f"{format_bytes(free_bytes(Path(tempfile.gettempdir())))} free in {tempfile.gettempdir()}",
    )


def iter_findings() -> Iterator[tuple[str, list[Finding]]]:
    """Yield the findings under each heading as soon as they are known.

    The first heading comes before torch is imported, which takes a second or more.
    """
    yield (
        "packages",
        [
            Finding("python", True, platform.python_version()),
            *(
                Finding(name, bool(package_version(name)), package_version(name) or "missing")
                for name in PACKAGES
            ),
        ],
    )
    yield "machine", _machine()
    yield "attention, first choice first", _attention()
    yield "optimizers", _optimizers()
    yield "head", [_deepspeed(), Finding("FSDP2", True, "torch's, parallel.head.engine = fsdp2")]
    yield "optional", [_transformer_engine(), _flash_attention(), _wandb()]


def _machine() -> list[Finding]:
    # other programs are watched while torch is imported
    busy_cores = CpuContention()
    seconds = _import_torch()
    time.sleep(max(0.0, WATCH_SECONDS - seconds))

    return [
        Finding(IMPORT_TORCH, True, f"{seconds:.1f} s, part of the start of every command"),
        _device(),
        _openmp(),
        _free_cores(busy_cores),
        _shared_memory(),
        _temp_dir(),
    ]


def _import_torch() -> float:
    """Import torch and return the seconds that it took; about 0 if it was imported before."""
    start = time.perf_counter()
    with work_progress("importing torch"), _no_interrupt_lost():
        importlib.import_module("torch")
    return time.perf_counter() - start


@contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Raise an interrupt once more at the end: C code that imports may have dropped the first."""
    came = False

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    with handling_signal(signal.SIGINT, interrupt):
        yield
    if came:
        raise KeyboardInterrupt


def _attention() -> list[Finding]:
    from bitlm_dist.kernels.attention import unavailable_reason

    return [
        Finding(name, unavailable_reason(name) is None, unavailable_reason(name) or note)
        for name, note in ATTENTION_BACKENDS.items()
    ]


def _optimizers() -> list[Finding]:
    return [
        Finding(pkgutil.resolve_name(path).__name__, True, f"optimizer.matrix_optimizer = {name}")
        for name, path in OPTIMIZERS.items()
    ]


def print_findings(as_json: bool) -> None:
    """Print a table per heading, or one JSON object with a list per heading."""
    if as_json:
        print(to_json({heading: _records(found) for heading, found in iter_findings()}, indent=1))
        return

    for heading, findings in iter_findings():
        rows = ((f.name, "yes" if f.is_available else "no", f.note) for f in findings)
        print_table(heading, ("name", "found", "note"), rows)


def _records(findings: list[Finding]) -> list[dict[str, object]]:
    return [{"name": f.name, "found": f.is_available, "note": f.note} for f in findings]
