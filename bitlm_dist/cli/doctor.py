"""`bitlm doctor`: installed packages, usable backends, and the benefit of each missing piece."""

import importlib
import importlib.util
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bitlm_dist.cli.console import print_table
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
from bitlm_dist.kernels.attention import unavailable_reason
from bitlm_dist.parallel.device import find_device, warning_of_unused_gpus
from bitlm_dist.parallel.zero_head import check_deepspeed
from bitlm_dist.training import fused_adam
from bitlm_dist.training.run_folder import PACKAGES, package_version

# Backends of model.backbone.attention.
ATTENTION_BACKENDS = {
    "fa4": "flash-attn 4 with tile lists",
    "triton": "the project's own kernels",
    "merge": "torch's flash attention plus the triangles of the blocks; on CPUs too",
    "flex": "torch's FlexAttention with tile lists; on a CPU without gradients",
    "reference": "a dense mask, for comparison",
}
WATCH_SECONDS = 0.5  # how long other programs are watched


class Finding(NamedTuple):
    """One line of the report; the note is the version, or the benefit of installing it."""

    name: str
    is_available: bool
    note: str


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _deepspeed() -> Finding:
    try:
        check_deepspeed()
    except UserError as error:
        return Finding("DeepSpeed ZeRO", False, str(error))
    return Finding("DeepSpeed ZeRO", True, "head.engine = deepspeed, stages 0 to 3")


def _transformer_engine() -> Finding:
    is_installed = _importable("transformer_engine.pytorch")
    brings = "fused layers and FP8 for the backbone: pip install 'bitlm-dist[te]' beside CUDA"
    return Finding(
        "Transformer Engine", is_installed, package_version("transformer-engine") or brings
    )


def _apex() -> Finding:
    if _importable("apex.optimizers"):
        return Finding("NVIDIA apex", True, "fused Adam")
    brings = "fused Adam, where Transformer Engine is not wanted: build it from NVIDIA's source"
    if _importable("apex"):
        brings = (
            "the installed package `apex` is another project's, not NVIDIA's; "
            f"NVIDIA's brings {brings}"
        )
    return Finding("NVIDIA apex", False, brings)


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
    is_installed = _importable("wandb")
    return Finding(
        "Weights & Biases",
        is_installed,
        package_version("wandb") or "logging.wandb_project: pip install 'bitlm-dist[wandb]'",
    )


def _free_cores() -> Finding:
    """Watch other programs for a moment."""
    busy_cores = CpuContention()
    time.sleep(WATCH_SECONDS)

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
        warning or f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads, gloo",
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


def collect_findings() -> dict[str, list[Finding]]:
    """Collect the findings, grouped by heading."""
    machine = [
        Finding("python", True, platform.python_version()),
        _device(),
        _openmp(),
        _free_cores(),
        _shared_memory(),
        _temp_dir(),
    ]
    packages = [
        Finding(name, bool(package_version(name)), package_version(name) or "missing")
        for name in PACKAGES
    ]
    attention = [
        Finding(name, unavailable_reason(name) is None, unavailable_reason(name) or note)
        for name, note in ATTENTION_BACKENDS.items()
    ]

    muon_dtype = "bf16" if torch.cuda.is_available() else "fp32"
    optimizers = [
        Finding("AdamW", True, f"{fused_adam.select_adamw('auto')[0]}, fused"),
        Finding("Muon", True, f"torch's, orthogonalised in {muon_dtype}"),
    ]

    return {
        "machine": machine,
        "packages": packages,
        "attention, first choice first": attention,
        "optimizers": optimizers,
        "head": [_deepspeed(), Finding("FSDP2", True, "torch's, head.engine = fsdp2")],
        "optional": [_transformer_engine(), _apex(), _flash_attention(), _wandb()],
    }


def print_findings() -> None:
    """Print a table per heading."""
    for heading, findings in collect_findings().items():
        rows = ((f.name, "yes" if f.is_available else "no", f.note) for f in findings)
        print_table(heading, ("name", "found", "note"), rows)
