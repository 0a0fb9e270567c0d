import pytest
import torch

from bitlm_dist.kernels import skinny_linear
from bitlm_dist.kernels.skinny_linear import Linear, linear


@pytest.fixture(params=[1, skinny_linear.MIN_WEIGHT_NUMEL], autouse=True)
def large(request, monkeypatch):
    """Treat all matrices as large, or none of these small ones."""
    monkeypatch.setattr(skinny_linear, "MIN_WEIGHT_NUMEL", request.param)


@pytest.mark.parametrize(
    "shape", [(1, 1, 16), (4, 1, 16), (2, 2, 16), (3, 16), (9, 16), (2, 5, 16)]
)
@pytest.mark.parametrize("rows", [7, 24, 32])
@pytest.mark.parametrize("grad", [True, False])
def test_products_are_torchs(shape, grad, rows, seed):
    a = torch.randn(shape)
    weight = torch.randn(rows, 16)
    layer = Linear(16, rows)

    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(linear(a, weight), torch.nn.functional.linear(a, weight))
        torch.testing.assert_close(
            layer(a), torch.nn.functional.linear(a, layer.weight, layer.bias)
        )


def test_a_product_of_a_product_is_torchs(seed):
    """The second product must not depend on the memory order of the first one's result."""
    a = torch.randn(4, 16)
    first = torch.randn(24, 16)
    second = torch.randn(8, 24)

    with torch.no_grad():
        ours = linear(linear(a, first), second)

    torch.testing.assert_close(ours, a @ first.t() @ second.t(), rtol=1e-4, atol=1e-4)
    assert ours.is_contiguous()


def test_gradients_reach_input_and_weight(seed):
    layer = Linear(16, 24)
    a = torch.randn(3, 16, requires_grad=True)

    layer(a).square().sum().backward()

    assert a.grad is not None
    assert layer.weight.grad is not None
