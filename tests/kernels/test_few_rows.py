import pytest
import torch
from bitlm_dist.kernels import few_rows
from bitlm_dist.kernels.few_rows import Linear, linear


@pytest.fixture(params=[1, few_rows.LARGE], autouse=True)
def large(request, monkeypatch):
    """Every matrix counts as large, or none of these small ones."""
    monkeypatch.setattr(few_rows, "LARGE", request.param)


@pytest.mark.parametrize("shape", [(1, 1, 16), (4, 1, 16), (2, 2, 16), (3, 16), (9, 16), (2, 5, 16)])
@pytest.mark.parametrize("rows", [7, 24, 32])
@pytest.mark.parametrize("grad", [True, False])
def test_products_are_torchs(shape, grad, rows, seed):
    a, weight = torch.randn(shape), torch.randn(rows, 16)
    layer = Linear(16, rows)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(linear(a, weight), torch.nn.functional.linear(a, weight))
        torch.testing.assert_close(layer(a), torch.nn.functional.linear(a, layer.weight, layer.bias))


def test_a_product_of_a_product_is_torchs(seed):
    """The first one's memory order must not matter to the second."""
    a, first, second = torch.randn(4, 16), torch.randn(24, 16), torch.randn(8, 24)
    with torch.no_grad():
        ours = linear(linear(a, first), second)
    torch.testing.assert_close(ours, a @ first.t() @ second.t(), rtol=1e-4, atol=1e-4)
    assert ours.is_contiguous()


def test_gradients_reach_input_and_weight(seed):
    layer, a = Linear(16, 24), torch.randn(3, 16, requires_grad=True)
    layer(a).square().sum().backward()
    assert a.grad is not None
    assert layer.weight.grad is not None
