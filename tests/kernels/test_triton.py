import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
FILES = [str(HERE / name) for name in ("test_attention.py", "test_in_block.py", "interpreted_triton.py")]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["not slow", "slow"], ids=["pairs", "rest"])
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs inside")
def test_kernels_in_the_interpreter(part):
    """In a process of its own: Triton reads TRITON_INTERPRET when the kernels are defined. The rest is that of the grid."""
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "-k", "triton", "-m", part, *FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_architectures_find_their_tiles():
    from bitlm_dist.kernels.tiles import SMALL, family

    assert [family(x) for x in (75, 80, 86, 89, 90, 100, 103, 120)] == [80, 80, SMALL, SMALL, 90, 100, 100, SMALL]
