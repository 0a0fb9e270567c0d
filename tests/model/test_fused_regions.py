"""Regions of a layer: the kernels that inductor generates for a GPU, and what they compute.

Inductor generates Triton code for the CPU here (`cpu_backend`), which is counted and not run.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._inductor import metrics
from torch._inductor.graph import GraphLowering

from bitlm_dist.compilation import enable_compiled_regions
from bitlm_dist.model.fused_regions import add_and_norm, norm_and_rotate, swiglu

ROWS, WIDTH, HEADS, HEAD_DIM = 512, 1024, 8, 128


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def arguments(dtype):
    """Arguments of each region; queries are a part of a larger tensor, as in a layer."""
    queries = leaf(ROWS, 2, 2, HEADS // 2 + 2, HEAD_DIM, dtype=dtype)[..., :-2, :]
    tables = torch.randn(2, ROWS, 1, 1, 1, HEAD_DIM, dtype=dtype)
    stream = [leaf(ROWS, 2, WIDTH, dtype=dtype) for _ in range(2)]
    return {
        add_and_norm: (*stream, leaf(WIDTH, dtype=dtype)),
        norm_and_rotate: (queries, leaf(HEAD_DIM, dtype=dtype), *tables),
        swiglu: (leaf(ROWS, 2, 2 * WIDTH, dtype=dtype),),
    }


# kernels forward and backward; a second one backward for the gradient of the norm's weight
KERNELS = {add_and_norm: (1, 2), norm_and_rotate: (1, 2), swiglu: (1, 1)}
by_region = pytest.mark.parametrize("region", KERNELS, ids=lambda region: region.__name__)


class NotRunError(Exception):
    """Raised instead of running generated code."""


@pytest.fixture
def generated(monkeypatch):
    """Numbers of Triton kernels of each graph that inductor generates code for."""
    counts = []

    def generate(graph):
        before = metrics.generated_kernel_count
        graph.codegen()
        counts.append(metrics.generated_kernel_count - before)
        return SimpleNamespace(call=mock.Mock(side_effect=NotRunError))

    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    hopper = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0
    )
    monkeypatch.setattr(driver, "_active", hopper)
    monkeypatch.setattr(torch.utils._triton, "triton_hash_with_backend", lambda: "none")
    monkeypatch.setattr(GraphLowering, "compile_to_module", generate)
    torch._dynamo.reset()
    with (
        inductor_config.patch(cpu_backend="triton", fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        enable_compiled_regions("inductor"),
    ):
        yield counts
    torch._dynamo.reset()


@pytest.mark.slow
@by_region
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_region_is_one_kernel_forward_and_at_most_two_backward(region, dtype, generated, seed):
    with pytest.raises(NotRunError):
        region(*arguments(dtype)[region])

    # sizes are dynamic, so the backward graph is compiled with the forward one
    assert tuple(generated) == KERNELS[region]


def run(region, backend):
    """Outputs and gradients of a region."""
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in arguments(torch.float32)[region]]
    with enable_compiled_regions(backend):
        out = region(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum((x * x.detach().sin()).sum() for x in out)
    return [*out, *torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])]


@by_region
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_regions_compute_what_is_written(region, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    expected = run(region, None)
    torch.manual_seed(0)
    for x, y in zip(run(region, backend), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(y.detach().abs().max()))
