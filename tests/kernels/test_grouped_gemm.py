import pytest
import torch

from bitlm_dist.kernels import grouped_matmul


@pytest.mark.parametrize("rows", [0, 1, 2, 50, 900])
def test_every_row_meets_the_matrix_it_chose(rows, seed):
    x = torch.randn(rows, 5, requires_grad=True)
    weights = torch.randn(7, 3, 5, requires_grad=True)
    index = torch.randint(0, 7, (rows,))

    ours = grouped_matmul(x, index, weights)
    truth = torch.einsum("td,tpd->tp", x, weights[index])
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)

    by = torch.randn(rows, 3)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weights), by),
        torch.autograd.grad(truth, (x, weights), by),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
