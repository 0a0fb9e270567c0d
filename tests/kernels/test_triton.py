import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
FILES = [
    str(HERE / name) for name in ("test_attention.py", "test_in_block.py", "interpreted_triton.py")
]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["not slow", "slow"], ids=["pairs", "rest"])
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs inside")
def test_kernels_in_the_interpreter(part):
    """Run in a separate process: Triton reads TRITON_INTERPRET when the kernels are defined."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-s",
        "-p",
        "no:cacheprovider",
        "-k",
        "triton",
        "-m",
        part,
        *FILES,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_architectures_find_their_tiles():
    from bitlm_dist.kernels.tile_configs import SMALL_SHARED_MEMORY, architecture_family

    assert [architecture_family(x) for x in (75, 80, 86, 89, 90, 100, 103, 120)] == [
        80,
        80,
        SMALL_SHARED_MEMORY,
        SMALL_SHARED_MEMORY,
        90,
        100,
        100,
        SMALL_SHARED_MEMORY,
    ]
