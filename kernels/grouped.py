"""Rows times matrices of their own choice, as in a mixture of experts."""

import torch
from torch import Tensor


def grouped_matmul(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Row t of x times the transpose of weights[index[t]]: every matrix is multiplied once, by the rows that chose it.

    Args:
        x: [T, D].
        index: int64 [T], in 0..E-1.
        weights: [E, P, D].

    Returns:
        [T, P] in the dtype of the product; differentiable in x and weights.
    """
    if len(x) <= 1:  # decoding; or a rank without a row, whose gradients are zeros
        return (x.unsqueeze(1) @ weights[index].mT).squeeze(1)
    order = index.argsort()
    chosen = index.bincount(minlength=len(weights)).tolist()
    parts = zip(x[order].split(chosen), weights.unbind(0), strict=True)
    out = torch.cat([part @ matrix.T for part, matrix in parts if len(part)])
    return torch.empty_like(out).index_copy(0, order, out)
