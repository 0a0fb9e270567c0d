"""Imports run downwards only, and the method can be read without Megatron."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top: a package may import those of later lines, and its own.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"bench", "checkpoints", "display", "doctor", "launching", "prepared"},
    {"terminal"},
    {"evaluation", "planning"},
    {"inference", "training"},
    {"data_prep", "launch"},
    {"checkpoint", "data"},
    {"model"},
    {"parallel"},
    {"config_loading"},
    {"config", "yaml_files"},
    {"diffusion", "kernels"},
    {"codes"},
    {"compilation"},
    {"disks", "paths"},
    {"cpu_threads", "errors", "files", "processes"},
]
PURE = {"diffusion", "kernels", "codes"}  # know nothing of megatron, ranks or configs


def modules():
    for folder in ("bitlm_dist", "kernels", "data_prep", "launch"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            inside = file.relative_to(ROOT).with_suffix("")
            parts = inside.parts[1:] if folder == "bitlm_dist" else inside.parts
            if parts != ("__init__",):
                yield parts[0], file


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def level(package):
    return next(i for i, layer in enumerate(LAYERS) if package in layer)


@pytest.mark.parametrize(("package", "file"), modules(), ids=lambda x: x.name if isinstance(x, Path) else x)
def test_imports_run_downwards(package, file):
    for name in imported(file):
        root, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if root == "bitlm_dist" and target != package:
            assert level(target) > level(package), f"{file} imports {name}"
        if package in PURE:
            assert root not in {"megatron", "deepspeed", "streaming", "pydantic"}, f"{file} imports {name}"
