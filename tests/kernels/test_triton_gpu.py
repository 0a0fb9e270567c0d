"""The compiled Triton kernels on a GPU: properties that the interpreter cannot show, as it runs one
program after another.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitlm_dist.kernels import block_causal_attention, in_block_attention

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_every_back_end_of_the_gpu():
    """The grids of the CPU tests, in bf16 too.

    They run in a separate process, as the GPU is hidden from tests without the mark `gpu`.
    """
    files = [
        str(Path(__file__).with_name(name))
        for name in ("test_attention.py", "test_in_block.py", "test_skinny_linear.py")
    ]
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command,
        env={**os.environ, "BITLM_TESTS_SEE_GPUS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_two_backward_passes_are_the_same_bits(seed):
    inputs = [
        torch.randn(1, heads, 1024, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for heads in (4, 2, 2)
    ]
    qkv = torch.randn(501, 4, 3, 4, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    attended = block_causal_attention(*inputs, block=4, backend="triton")
    inside = in_block_attention(qkv, 4, backend="triton")
    total = attended.square().sum() + inside.square().sum()

    first, second = (
        torch.autograd.grad(total, (*inputs, qkv), retain_graph=True) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [64, 128])
def test_long_sequences_with_documents(width, seed):
    inputs = [
        torch.randn(1, heads, 4096, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for heads in (2, 1, 1)
    ]
    ids = (torch.rand(1, 4096, device="cuda") < 1 / 700).cumsum(1)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for tensors, backend in ((inputs, "triton"), (exact, "reference")):
        out = block_causal_attention(*tensors, block=4, document_ids=ids, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))

    for x, y in zip(*results, strict=True):
        assert (x.double() - y).abs().max() / y.abs().max() < 2e-2
