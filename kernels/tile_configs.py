"""Fixed tile sizes of the attention kernels, by architecture, head dimension and dtype: no
autotuning at run time.

``python -m bitlm_dist.kernels.aot`` compiles every entry and checks it against its budget of
registers and shared memory.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class TileConfig:
    """Tile size and launch parameters of one kernel."""

    num_queries: int
    num_keys: int
    num_warps: int
    num_stages: int  # of the software pipeline that loads the tiles of the inner loop


@dataclass(frozen=True)
class KernelTileConfigs:
    """Tile configs of the forward kernel and the two backward kernels."""

    forward: TileConfig
    dq: TileConfig
    dkv: TileConfig


HEAD_DIMS = (16, 32, 64, 128)

# compute capabilities with 99 KiB of shared memory per thread block: 8.6, 8.9, 12.x
SMALL_SHARED_MEMORY = 86

_NARROW = KernelTileConfigs(
    TileConfig(128, 64, 8, 3), TileConfig(128, 64, 8, 2), TileConfig(32, 64, 4, 3)
)
_AMPERE_128 = KernelTileConfigs(
    TileConfig(64, 64, 8, 3), TileConfig(64, 32, 4, 2), TileConfig(32, 64, 8, 2)
)
_HOPPER_64 = KernelTileConfigs(
    TileConfig(128, 64, 8, 3), TileConfig(128, 64, 8, 2), TileConfig(64, 128, 8, 2)
)
_HOPPER_128 = KernelTileConfigs(
    TileConfig(128, 64, 8, 3), TileConfig(128, 64, 8, 2), TileConfig(32, 128, 8, 3)
)

HALF_PRECISION: dict[int, dict[int, KernelTileConfigs]] = {
    80: {16: _NARROW, 32: _NARROW, 64: _NARROW, 128: _AMPERE_128},
    SMALL_SHARED_MEMORY: {16: _NARROW, 32: _NARROW, 64: _NARROW, 128: _AMPERE_128},
    90: {16: _HOPPER_64, 32: _HOPPER_64, 64: _HOPPER_64, 128: _HOPPER_128},
    100: {16: _HOPPER_64, 32: _HOPPER_64, 64: _HOPPER_64, 128: _HOPPER_128},
}

# fp32 runs without tensor cores and spills registers: exact, for comparisons, not for training.
_FP32 = KernelTileConfigs(
    TileConfig(64, 32, 4, 2), TileConfig(64, 32, 4, 2), TileConfig(32, 64, 4, 2)
)
_FP32_128 = KernelTileConfigs(
    TileConfig(32, 32, 4, 1), TileConfig(32, 32, 4, 1), TileConfig(32, 32, 4, 1)
)


def architecture_family(capability: int) -> int:
    """Architecture in the table whose tiles suit a compute capability (90 for 9.0)."""
    if capability in (86, 87, 89) or capability >= 120:
        return SMALL_SHARED_MEMORY

    return max(known for known in (80, 90, 100) if known <= max(capability, 80))


def lookup_tile_configs(architecture: int, head_dim: int, is_fp32: bool) -> KernelTileConfigs:
    """Tile configs for an architecture and a head dimension, which must be in HEAD_DIMS."""
    if is_fp32:
        return _FP32_128 if head_dim == 128 else _FP32
    return HALF_PRECISION[architecture][head_dim]


@cache
def architecture_of(device: torch.device) -> int:
    """Architecture of a CUDA device; Hopper for other devices."""
    # not CUDA: Triton's interpreter, which runs any tile
    if device.type != "cuda":
        return 90

    major, minor = torch.cuda.get_device_capability(device)
    return architecture_family(10 * major + minor)
