"""Prints constraints for pip: a file's, or with a torch for CUDA that this Python already has.

`python constraints/keep_torch.py FILE`, for `make setup`: in a container or conda environment torch
was built for the driver that is there. If it fits this project, its version takes the place of the
file's, and the first line says so. A torch of another virtual environment would not be seen from
the new one, and is not kept.
"""

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path

MIN_TORCH = (2, 11)
# not an alpha version, which pip would replace
RELEASE = re.compile(r"(\d+)\.(\d+)\.\d+(?:\.post\d+)?(?:\+[\w.]+)?")
KEPT = ("torch", "triton", "torchvision")
CUDA_PACKAGES = ("torch", "triton", "torchvision", "nvidia-", "cuda-")
KEEPS = "# keeps the torch of this Python"


def fitting_torch() -> str | None:
    """Version of a torch for CUDA that fits this project; None if there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or sys.prefix != sys.base_prefix:
        return None

    try:
        version = metadata.version("torch")
        text = (Path(spec.origin).parent / "version.py").read_text()
    except (metadata.PackageNotFoundError, OSError):
        return None
    match = RELEASE.fullmatch(version)
    has_cuda = re.search(r"^cuda\b.*= *['\"]\d", text, re.MULTILINE) is not None
    fits = match is not None and (int(match[1]), int(match[2])) >= MIN_TORCH
    return version if has_cuda and fits else None


def constraints(text: str, torch: str | None) -> str:
    """Constraints of a file, with the packages of the torch that is kept, if any."""
    if torch is None:
        return text

    others = [line for line in text.splitlines() if not line.startswith(CUDA_PACKAGES)]
    pins = []
    for name in KEPT:
        try:
            pins.append(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return "\n".join([KEEPS, *others, *pins]) + "\n"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    if not file.is_file():
        sys.exit(f"bitlm: there is no {file}: CUDA=12 and CUDA=13 have files for Python 3.11, 3.12")
    print(constraints(file.read_text(), fitting_torch()), end="")
