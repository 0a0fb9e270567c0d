"""Versions for CUDA 12 and 13, and the torch that `make setup` keeps."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "constraints"
FILES = [f"py{python}-cu{cuda}.txt" for python in (311, 312) for cuda in (12, 13)]
PAIRS = {"2.11.0": "3.6.0", "2.13.0": "3.7.1"}  # triton by torch, which pins it


def pins(text):
    """Versions by name."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return {canonicalize_name(name): version for name, version in found.items()}


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["dev"], *extras["te"], *extras["fa4"]]
    return [Requirement(line) for line in lines if not line.startswith("bitlm-dist")]


@pytest.mark.parametrize("name", FILES)
def test_a_file_pins_all_that_is_needed(name):
    versions = pins((FOLDER / name).read_text())
    for requirement in requirements():
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} {version}"
    assert versions["triton"] == PAIRS[versions["torch"]]

    cuda = name.removesuffix(".txt")[-2:]
    assert f"transformer-engine-cu{cuda}" in versions
    # a wheel of torch for CUDA 12 pins its own libraries
    assert ("nvidia-nccl-cu13" in versions) == (cuda == "13")
    assert not any(f"-cu{25 - int(cuda)}" in other for other in versions if "cutlass" not in other)


def test_both_pythons_have_the_same_versions():
    for cuda in (12, 13):
        first, second = (pins((FOLDER / f"py{p}-cu{cuda}.txt").read_text()) for p in (311, 312))
        assert all(first[name] == second[name] for name in first.keys() & second.keys())


@pytest.fixture
def keep(tmp_path):
    """Runs keep_torch.py where a torch of some version is installed."""

    def run(version, cuda):
        torch = tmp_path / "torch"
        torch.mkdir()
        (torch / "__init__.py").write_text("raise ImportError")
        (torch / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
        for name in (f"torch-{version}", "triton-3.9.9"):
            info = tmp_path / f"{name}.dist-info"
            info.mkdir()
            fields = zip(("Name", "Version"), name.split("-", 1), strict=True)
            (info / "METADATA").write_text("".join(f"{key}: {x}\n" for key, x in fields))

        # outside of any virtual environment
        python = Path(sys.base_prefix) / "bin" / "python3"
        command = [str(python), str(FOLDER / "keep_torch.py"), str(ROOT / "constraints.txt")]
        environment = {"PYTHONPATH": str(tmp_path)}
        return subprocess.check_output(command, env=environment, text=True)

    return run


def test_a_torch_for_cuda_is_kept(keep):
    printed = keep("2.12.0+cu130", "13.0")
    assert printed.startswith("# keeps")
    versions = pins(printed)
    assert versions["torch"] == "2.12.0+cu130"
    assert versions["triton"] == "3.9.9"
    before = pins((ROOT / "constraints.txt").read_text())
    assert all(
        versions[n] == v for n, v in before.items() if n not in ("torch", "triton", "torchvision")
    )


@pytest.mark.parametrize(
    ("version", "cuda"),
    [("2.13.0+cpu", None), ("2.10.0+cu128", "12.8"), ("2.12.0a0+nv26.1", "13.0")],
)
def test_another_torch_is_not_kept(version, cuda, keep):
    assert keep(version, cuda) == (ROOT / "constraints.txt").read_text()
