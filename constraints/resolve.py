"""Rewrites constraints/*.txt from metadata alone: `python constraints/resolve.py`.

Needs uv (`pip install uv`), which reads the metadata of wheels without downloading them. Versions
are those of ../constraints.txt where they fit. Two packages are sdists, which nothing here builds:
DeepSpeed and transformer-engine-torch; their own requirements are listed in SDISTS.

The wheels of torch on PyPI are built for CUDA 13. Those for CUDA 12 are on PyTorch's own index and
pin their CUDA libraries themselves, so the files for CUDA 12 name none.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTHONS = ("3.11", "3.12")
# CUDA: versions of torch and its triton, extras of flash-attn-4 and Transformer Engine
ROWS = {
    "12": ("2.11.0", "3.6.0", "flash-attn-4", "transformer-engine[core-cu12]"),
    "13": ("2.13.0", "3.7.1", "flash-attn-4[cu13]", "transformer-engine[core-cu13]"),
}
PLATFORM = "x86_64-manylinux_2_28"
# requirements of packages that are sdists, from their metadata
SDISTS = {
    "deepspeed": ["hjson", "msgpack", "ninja", "py-cpuinfo", "tqdm"],
    "transformer-engine-torch": ["onnx", "onnxscript", "nvdlfw-inspect", "nvidia-cudnn-frontend"],
}
CUDA_LIBRARIES = re.compile(
    r"(nvidia-(?!cutlass|cudnn-frontend|ml)|cuda-(?:toolkit|bindings|pathfinder))"
)
REPLACED = re.compile(r"(torch|torchvision|triton|deepspeed)==")


def requirements() -> list[str]:
    """Requirements of the package and of its extras `dev` and below that are wheels."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = [*project["dependencies"], *extras["dev"]]
    for name in ("parquet", "dedup", "language", "sentencepiece", "wandb"):
        found += extras[name]
    return [line for line in found if not line.startswith(("deepspeed", "bitlm-dist"))]


def resolve(python: str, cuda: str) -> str:
    """Resolve one row; returns the content of its file."""
    torch, triton, attention, engine = ROWS[cuda]
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not REPLACED.match(line)
    ]
    needed = [*requirements(), attention, engine, *(r for rs in SDISTS.values() for r in rs)]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "requirements.in"
        constraints = Path(folder) / "constraints.txt"
        source.write_text("\n".join(needed) + "\n")
        constraints.write_text("\n".join([*pins, f"torch=={torch}", f"triton=={triton}"]) + "\n")
        command = ["uv", "pip", "compile", str(source), "-c", str(constraints), "--quiet"]
        options = ["--python-version", python, "--python-platform", PLATFORM, "--no-header"]
        options += ["--only-binary", ":all:", "--no-annotate", "--prerelease", "if-necessary"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"Python {python}, CUDA {cuda}: {done.stderr}")

    lines = [
        line
        for line in done.stdout.splitlines()
        if "==" in line and not (cuda == "12" and CUDA_LIBRARIES.match(line))
    ]
    engine_version = next(x for x in lines if x.startswith("transformer-engine==")).split("==")[1]
    lines += [pin for pin in (ROOT / "constraints.txt").read_text().split() if "deepspeed" in pin]
    lines.append(f"transformer-engine-torch=={engine_version}")
    head = f"# Python {python}, CUDA {cuda}; by resolve.py from metadata, never installed."
    return "\n".join([head, *sorted(lines, key=str.lower)]) + "\n"


if __name__ == "__main__":
    for python in PYTHONS:
        for cuda in ROWS:
            name = f"py{python.replace('.', '')}-cu{cuda}.txt"
            (HERE / name).write_text(resolve(python, cuda))
            print(name)
