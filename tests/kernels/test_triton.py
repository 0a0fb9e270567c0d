import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CASES = Path(__file__).with_name("interpreted_triton.py")


def test_kernels_in_the_interpreter():
    """In a process of its own: Triton reads TRITON_INTERPRET when the kernels are defined."""
    command = [sys.executable, "-m", "pytest", "-s", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes tensors of the CPU")
def test_a_tensor_of_the_cpu_is_refused():
    from bitlm_dist.kernels import triton_attention, triton_in_block

    q = torch.zeros(1, 1, 4, 16)
    with pytest.raises(ValueError, match=r"q is on cpu: .* backend='sdpa' runs anywhere"):
        triton_attention.block_causal_attention(q, q, q, block=2)
    with pytest.raises(ValueError, match="qkv is on cpu"):
        triton_in_block.in_block_attention(torch.zeros(1, 4, 3, 1, 16), 4)


def test_architectures_find_their_tiles():
    from bitlm_dist.kernels.tiles import SMALL, family

    assert [family(x) for x in (75, 80, 86, 89, 90, 100, 103, 120)] == [80, 80, SMALL, SMALL, 90, 100, 100, SMALL]
