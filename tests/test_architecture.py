"""Packages import only from lower layers, and the method does not depend on Megatron."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top: a package may import those of later lines, and its own.
LAYERS = [
    {"__main__", "experiments"},
    {"cli"},
    {"acceptance"},
    {"bench"},
    {"evaluation", "planning"},
    {"training"},
    {"inference"},
    {"data_prep", "launch"},
    {"checkpoint", "data"},
    {"model"},
    {"parallel"},
    {"config_loading"},
    {"config", "yaml_files"},
    {"config_section"},
    {"diffusion", "kernels"},
    {"codes"},
    {"compilation"},
    {"disks", "paths", "plots"},
    {"cpu_contention", "renamed_keys"},
    {"old_heads"},
    {
        "cpu_threads",
        "errors",
        "files",
        "formatting",
        "package_versions",
        "processes",
        "recording",
        "registry",
        "strict_json",
    },
]
PURE = {"diffusion", "kernels", "codes"}  # know nothing of megatron, ranks or configs


def package_of(module):
    """First part of a module's path, but `config` for a section of the config beside its owner."""
    package, *inside = module
    return "config" if "config" in inside and package != "cli" else package


def modules():
    for folder in ("bitlm_dist", "kernels", "data_prep", "launch", "experiments"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            inside = file.relative_to(ROOT).with_suffix("")
            parts = inside.parts[1:] if folder == "bitlm_dist" else inside.parts
            if parts != ("__init__",):
                yield package_of(parts), file


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def level(package):
    return next(i for i, layer in enumerate(LAYERS) if package in layer)


@pytest.mark.parametrize(
    ("package", "file"), modules(), ids=lambda x: x.name if isinstance(x, Path) else x
)
def test_imports_run_downwards(package, file):
    for name in imported(file):
        root, _, rest = name.partition(".")
        target = package_of(rest.split("."))
        if root == "bitlm_dist" and target != package:
            assert level(target) > level(package), f"{file} imports {name}"
        if package in PURE:
            assert root not in {"megatron", "deepspeed", "streaming", "pydantic"}, (
                f"{file} imports {name}"
            )


# Tests of more than one module; every other test file bears the name of its module.
TOPICS = {
    "acceptance/test_acceptance.py": "the command, from end to end",
    "bench/test_bench.py": "the command, with all its runners",
    "cli/test_bad_input.py": "errors of every command, a table",
    "cli/test_cli.py": "the command line as a whole",
    "data_prep/test_tokenizer_copies.py": "tokenizers of other projects",
    "evaluation/test_missing_values.py": "values that cannot be computed, in every output",
    "faults/test_kills.py": "kill -9 at any moment",
    "golden/test_golden.py": "losses on file",
    "kernels/test_triton.py": "Triton's interpreter",
    "kernels/test_triton_gpu.py": "Triton on a GPU",
    "model/test_compile.py": "compiled against plain code",
    "parallel/test_jobs.py": "resuming on another layout",
    "parallel/test_parity.py": "every layout against one process",
    "parallel/test_zero_head.py": "the head under every partitioner against one process",
    "parallel/test_saving.py": "saving on several ranks",
    "slurm/test_cluster.py": "the test cluster itself",
    "slurm/test_launch.py": "jobs on a real Slurm",
    "test_architecture.py": "imports and names of files",
    "test_commands.py": "the commands in the docs",
    "test_constraints.py": "versions for CUDA, and the torch that is kept",
    "test_copy_task.py": "a task that a model must learn",
    "test_docs.py": "links and quotes of the docs",
    "test_mutants.py": "the patches",
    "test_style.py": "how the source reads",
    "test_suite.py": "the test suite cleans up",
    "training/test_counts.py": "predicted tokens and bytes, from data to metrics",
    "training/test_health.py": "health of checkpoints, from trainer to store",
    "training/test_old_runs.py": "runs of earlier versions",
    "training/test_places.py": "run folders that move",
    "training/test_resume.py": "resume is bitwise",
    "training/test_saves_in_training.py": "saves that fail or overlap",
    "training/test_stopping.py": "signals and stop files",
    "training/test_training_gpu.py": "training on a GPU",
}


def test_tests_are_named_after_their_modules():
    sources = set()
    for _, file in modules():
        path = file.relative_to(ROOT)
        inside = path.relative_to("bitlm_dist") if path.parts[0] == "bitlm_dist" else path
        sources.add(str(inside.with_name(f"test_{inside.name}")))

    tests = ROOT / "tests"
    files = {str(file.relative_to(tests)) for file in tests.rglob("test_*.py")}
    assert files - sources - TOPICS.keys() == set(), "name it after its module, or add a topic"
    assert TOPICS.keys() - files == set(), "a topic without a file"
