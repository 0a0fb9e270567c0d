import pytest
import torch
from bitlm_dist.kernels.few_rows import Linear, matmul


@pytest.mark.parametrize("shape", [(1, 1, 16), (4, 1, 16), (2, 2, 16), (3, 16), (9, 16), (2, 5, 16)])
@pytest.mark.parametrize("grad", [True, False])
def test_products_are_torchs(shape, grad, seed):
    a, weight = torch.randn(shape), torch.randn(24, 16)
    layer = Linear(16, 24)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(matmul(a, weight.t()), torch.matmul(a, weight.t()))
        torch.testing.assert_close(layer(a), torch.nn.functional.linear(a, layer.weight, layer.bias))


def test_gradients_reach_input_and_weight(seed):
    layer, a = Linear(16, 24), torch.randn(3, 16, requires_grad=True)
    layer(a).square().sum().backward()
    assert a.grad is not None
    assert layer.weight.grad is not None
