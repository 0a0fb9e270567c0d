"""`bitlm doctor`: what is installed, what was found, and what each missing piece would bring."""

import importlib
import importlib.util
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bitlm_dist.cpu_threads import NUM_THREADS, SPIN_COUNT, WAIT_POLICY, BusyCores
from bitlm_dist.disks import SHARED_MEMORY, free_bytes, in_words, shared_memory_problem, temporary_problem
from bitlm_dist.errors import UserError
from bitlm_dist.kernels.attention import missing
from bitlm_dist.parallel.device import find_device, warning_of_unused_gpus
from bitlm_dist.parallel.zero_head import check_deepspeed
from bitlm_dist.training import fused_adam
from bitlm_dist.training.run_folder import PACKAGES, package_version

ATTENTION = {  # back ends of model.backbone.attention
    "fa4": "flash-attn 4 with tile lists",
    "triton": "the project's own kernels",
    "merge": "torch's flash attention and the triangles of the blocks; on CPUs too",
    "flex": "torch's FlexAttention with tile lists; on a CPU without gradients",
    "reference": "a dense mask, for comparison",
}
WATCHED = 0.5  # seconds


class Finding(NamedTuple):
    """One line: a name, whether it was found, and a note (version, or what it would bring)."""

    name: str
    found: bool
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
    found = _importable("transformer_engine.pytorch")
    brings = "fused layers and FP8 for the backbone: pip install 'bitlm-dist[te]' beside CUDA"
    return Finding("Transformer Engine", found, package_version("transformer-engine") or brings)


def _apex() -> Finding:
    if _importable("apex.optimizers"):
        return Finding("NVIDIA apex", True, "fused Adam")
    brings = "fused Adam, where Transformer Engine is not wanted: build it from NVIDIA's source"
    if _importable("apex"):
        brings = f"the installed package `apex` is another project's, not NVIDIA's; NVIDIA's brings {brings}"
    return Finding("NVIDIA apex", False, brings)


def _flash_attention() -> Finding:
    for module, distribution in (("flash_attn.cute", "flash-attn-4"), ("flash_attn", "flash-attn")):
        if _importable(module) and package_version(distribution):
            return Finding("flash-attn", True, f"{distribution} {package_version(distribution)}")
    return Finding("flash-attn", False, "faster block-causal attention on GPUs: pip install 'bitlm-dist[fa4]' beside CUDA")


def _wandb() -> Finding:
    found = _importable("wandb")
    return Finding("Weights & Biases", found, package_version("wandb") or "logging.wandb_project: pip install 'bitlm-dist[wandb]'")


def _free_cores() -> Finding:
    """Watches for a moment what other programs do."""
    busy_cores = BusyCores()
    time.sleep(WATCHED)
    cores = len(os.sched_getaffinity(0))
    warning = busy_cores.warning(torch.get_num_threads())
    return Finding("free cores", warning is None, warning or f"{max(0.0, cores - busy_cores.by_others()):.1f} of {cores}")


def _waiting() -> Finding:
    variables = [f"{name}={os.environ[name]}" for name in (NUM_THREADS, WAIT_POLICY, SPIN_COUNT) if name in os.environ]
    return Finding("OpenMP", bool(variables), " ".join(variables) or "as its library chooses")


def _device() -> Finding:
    try:
        find_device(os.environ)
    except UserError as error:
        return Finding("device", False, str(error))
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return Finding("device", True, f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, NCCL")
    warning = warning_of_unused_gpus()
    return Finding("device", warning is None, warning or f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads, gloo")


def _shared_memory() -> Finding:
    problem = shared_memory_problem()
    return Finding("shared memory", not problem, problem or f"{in_words(free_bytes(SHARED_MEMORY))} free in {SHARED_MEMORY}")


def _temporary() -> Finding:
    problem = temporary_problem()
    if problem:
        return Finding("temporary files", False, problem)
    return Finding("temporary files", True, f"{in_words(free_bytes(Path(tempfile.gettempdir())))} free in {tempfile.gettempdir()}")


def examine() -> dict[str, list[Finding]]:
    """Findings by heading."""
    packages = [Finding(name, bool(package_version(name)), package_version(name) or "missing") for name in PACKAGES]
    return {
        "machine": [
            Finding("python", True, platform.python_version()),
            _device(),
            _waiting(),
            _free_cores(),
            _shared_memory(),
            _temporary(),
        ],
        "packages": packages,
        "attention, first choice first": [Finding(n, missing(n) is None, missing(n) or note) for n, note in ATTENTION.items()],
        "optimizers": [
            Finding("AdamW", True, f"{fused_adam.find('auto')[0]}, fused"),
            Finding("Muon", True, "torch's, orthogonalised in " + ("bf16" if torch.cuda.is_available() else "fp32")),
        ],
        "head": [_deepspeed(), Finding("FSDP2", True, "torch's, head.engine = fsdp2")],
        "optional": [_transformer_engine(), _apex(), _flash_attention(), _wandb()],
    }
