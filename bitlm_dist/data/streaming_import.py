"""Import of mosaicml-streaming without what BitLM does not use of it.

The package imports its classes for images and text as a whole, and they bring torchvision, whose build on the index fails beside a
CPU build of torch, and transformers: two seconds and thousands of files in every process. Only its datasets for tensors are wanted,
and these need neither; so its two outer packages are entered without being executed.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PACKAGES = ("streaming", "streaming.base")
ONE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def streaming(name: str) -> Any:
    """The module ``streaming.base.NAME``."""
    for package in PACKAGES:
        if package not in sys.modules:
            spec = importlib.util.find_spec(package)
            assert spec is not None
            sys.modules[package] = importlib.util.module_from_spec(spec)  # has its path, so that modules inside are found
    importlib.import_module("streaming.base.dataset")  # first: its modules import one another in circles
    return importlib.import_module(f"streaming.base.{name}")


@contextmanager
def alone() -> Iterator[None]:
    """While open, streaming takes this process for the only one.

    Its datasets meet at barriers and share memory between the ranks of a node and the workers of a rank; here each process reads by
    itself what it is asked for, so that the data do not depend on who else reads.
    """
    from torch import distributed

    world = streaming("world")
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
