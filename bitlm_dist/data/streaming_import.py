"""Import of mosaicml-streaming beside a CPU build of torch.

``import streaming`` imports torchvision for its vision classes, and the torchvision on the index is built for CUDA: it fails beside
a CPU torch. Where that is so, a stand-in with the three names that streaming asks for takes its place; BitLM reads no images.
"""

import importlib
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ONE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def _stand_in() -> None:
    def unavailable(*args: Any, **kwargs: Any) -> None:
        raise ImportError("torchvision is not installed for this build of torch")

    root = types.ModuleType("torchvision")
    datasets = types.ModuleType("torchvision.datasets")
    transforms = types.ModuleType("torchvision.transforms")
    functional = types.ModuleType("torchvision.transforms.functional")
    datasets.VisionDataset = type("VisionDataset", (), {})  # type: ignore[attr-defined]
    functional.to_tensor = unavailable  # type: ignore[attr-defined]
    root.datasets, root.transforms, transforms.functional = datasets, transforms, functional  # type: ignore[attr-defined]
    for module in (root, datasets, transforms, functional):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)  # find_spec asks for one
        sys.modules[module.__name__] = module


def import_streaming() -> types.ModuleType:
    """The package ``streaming``."""
    if "streaming" not in sys.modules:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError):
            for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
            _stand_in()
    return importlib.import_module("streaming")


@contextmanager
def alone() -> Iterator[None]:
    """While open, streaming takes this process for the only one.

    Its datasets meet at barriers and share memory between the ranks of a node and the workers of a rank; here each process reads by
    itself what it is asked for, so that the data do not depend on who else reads.
    """
    from torch import distributed

    import_streaming()
    world: Any = importlib.import_module("streaming.base.world")
    environment = {name: os.environ.get(name) for name in ONE_PROCESS}
    is_initialized, worker_info = distributed.is_initialized, world.get_worker_info
    os.environ.update(ONE_PROCESS)
    distributed.is_initialized, world.get_worker_info = (lambda: False), (lambda: None)
    try:
        yield
    finally:
        distributed.is_initialized, world.get_worker_info = is_initialized, worker_info
        for name, value in environment.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
