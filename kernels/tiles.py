"""Fixed tile sizes of the attention kernels, by architecture, width of a head and size of a number: no search at run time.

``python -m bitlm_dist.kernels.aot`` compiles every entry and holds it against its budget of registers and shared memory.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one tile, warps of its program, stages of the pipeline that loads the tiles of its loop."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Of the forward kernel, of the gradient of the queries, of the gradient of keys and values."""

    forward: Tile
    dq: Tile
    dkv: Tile


WIDTHS = (16, 32, 64, 128)
SMALL = 86  # compute capabilities with 99 KiB of shared memory a block: 8.6, 8.9, 12.x

_NARROW = Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 64, 4, 3))
_AMPERE_128 = Tiles(Tile(64, 64, 8, 3), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2))
_HOPPER_64 = Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2))
_HOPPER_128 = Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 3))

HALF: dict[int, dict[int, Tiles]] = {
    80: {16: _NARROW, 32: _NARROW, 64: _NARROW, 128: _AMPERE_128},
    SMALL: {16: _NARROW, 32: _NARROW, 64: _NARROW, 128: _AMPERE_128},
    90: {16: _HOPPER_64, 32: _HOPPER_64, 64: _HOPPER_64, 128: _HOPPER_128},
    100: {16: _HOPPER_64, 32: _HOPPER_64, 64: _HOPPER_64, 128: _HOPPER_128},
}
# fp32 multiplies without tensor cores and its registers spill: exact, for comparisons, not for training.
_FLOAT = Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2))
_FLOAT_128 = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))


def family(capability: int) -> int:
    """The architecture of the table whose tiles a compute capability (90 for 9.0) runs."""
    if capability in (86, 87, 89) or capability >= 120:
        return SMALL
    return max(known for known in (80, 90, 100) if known <= max(capability, 80))


def tiles(architecture: int, width: int, float32: bool) -> Tiles:
    """Entry of the table; ``width`` is one of WIDTHS."""
    if float32:
        return _FLOAT_128 if width == 128 else _FLOAT
    return HALF[architecture][width]


@cache
def architecture_of(device: torch.device) -> int:
    """Architecture of a CUDA device; of anything else, as under Triton's interpreter, Hopper's."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return family(10 * major + minor)
