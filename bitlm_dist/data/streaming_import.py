"""Import of mosaicml-streaming without the parts that BitLM does not use.

The package imports its classes for images and text unconditionally. They require transformers, and
torchvision, whose build on the index does not work with a CPU build of torch: two seconds and
thousands of files per process. BitLM only uses the datasets for tensors, which need neither. So the
two outer packages are registered without executing their ``__init__`` modules.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SKIPPED_PACKAGES = ("streaming", "streaming.base")
SINGLE_PROCESS_ENVIRONMENT = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
}


def import_streaming(name: str) -> Any:
    """Import the module ``streaming.base.NAME``."""
    for package in SKIPPED_PACKAGES:
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            assert spec is not None
            # The module is empty but has the package's path, so that submodules are found.
            sys.modules[package] = importlib.util.module_from_spec(spec)

    # First, because its modules import one another in circles.
    importlib.import_module("streaming.base.dataset")
    return importlib.import_module(f"streaming.base.{name}")


@contextmanager
def as_single_process() -> Iterator[None]:
    """Make streaming believe that this is the only process, while the context is open.

    Its datasets synchronize at barriers and share memory between the ranks of a node and the
    workers of a rank. Here each process must read on its own, so that the data do not depend on
    which other processes read.
    """
    from torch import distributed

    world = import_streaming("world")
    environment = {name: os.environ.get(name) for name in SINGLE_PROCESS_ENVIRONMENT}
    is_initialized = distributed.is_initialized
    worker_info = world.get_worker_info

    # streaming takes ranks from the environment or torch.distributed, and workers from torch.
    os.environ.update(SINGLE_PROCESS_ENVIRONMENT)
    distributed.is_initialized = lambda: False
    world.get_worker_info = lambda: None
    try:
        yield
    finally:
        distributed.is_initialized = is_initialized
        world.get_worker_info = worker_info
        for name, value in environment.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
