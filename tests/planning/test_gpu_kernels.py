"""Kernels of operators and their bytes, counted by hand. Whole steps: test_trace.py.

Meta tensors stand for those on a fake GPU.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bitlm_dist.planning.gpu_kernels import fused_kernel_callbacks, operator_bytes, run_fused

N = 1000
FLOAT, INT = 4, 8


class Recorder(TorchDispatchMode):
    """Records the bytes of every operator that launches a kernel."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (num_bytes := operator_bytes(func, args, kwargs or {}, out)) is not None:
            self.kernels.append(num_bytes)
        return out


# function of a tensor [N], and the bytes of each of its kernels
CASES = {
    "add": (lambda x: x + x.clone(), [2 * FLOAT * N, 3 * FLOAT * N]),
    "add in place": (lambda x: x.add_(1), [2 * FLOAT * N]),
    "add into": (lambda x: torch.add(x, 1, out=torch.empty_like(x)), [2 * FLOAT * N]),
    "copy over": (lambda x: torch.empty_like(x).copy_(x), [2 * FLOAT * N]),
    "fill": (lambda x: torch.empty_like(x).zero_(), [FLOAT * N]),
    "cast": (lambda x: x.bfloat16(), [6 * N]),
    "view": (lambda x: x.view(10, -1).transpose(0, 1)[3:].detach(), []),
    "allocation": (lambda x: x.new_empty(7), []),
    "reshape that copies": (lambda x: x.view(10, -1).T.reshape(-1), [2 * FLOAT * N]),
    "repeated row": (
        lambda x: x.view(10, -1) + x.new_empty(1).expand(10, N // 10),
        [FLOAT * (2 * N + 1)],
    ),
    "matrix product": (
        lambda x: x.view(10, -1) @ x.view(100, -1),
        [FLOAT * (2 * N + 100)],
    ),
    "sum": (lambda x: x.view(10, -1).sum(0), [FLOAT * (N + 100)]),
    "lookup": (
        lambda x: x.view(-1, 2)[x.new_empty(7, dtype=torch.int64)],
        [7 * INT + 2 * 14 * FLOAT],
    ),
    "several tensors": (lambda x: torch._foreach_mul_([x, x.view(-1)], 2), [4 * FLOAT * N]),
}


@pytest.mark.parametrize("case", CASES)
def test_operators_move_inputs_and_outputs(case):
    function, expected = CASES[case]
    x = torch.empty(N, device="meta")
    with Recorder() as recorder:
        function(x)
    assert recorder.kernels == expected


def test_operators_on_the_host_are_no_kernels():
    with Recorder() as recorder:
        assert (torch.ones(3) + 1).device.type == "cpu"
    assert not recorder.kernels


def test_a_fused_function_is_one_kernel():
    kernels = []

    def record(name, read, written):
        kernels.append((name, [x.shape for x in read], [x.shape for x in written]))

    fused_kernel_callbacks.append(record)
    try:
        with Recorder() as recorder:
            out = run_fused(
                "outer",
                lambda x, power: run_fused("inner", torch.exp, x) ** power,
                torch.empty(N, device="meta"),
                power=3,
            )
    finally:
        fused_kernel_callbacks.remove(record)

    assert kernels == [("outer", [(N,)], [(N,)])]
    assert not recorder.kernels
    assert out.shape == (N,)
