"""Grouped matrix product: every row is multiplied by a matrix of its choice, as in a mixture of
experts.
"""

import torch
from torch import Tensor


def grouped_matmul(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Multiply row t of x by the transpose of ``weights[index[t]]``.

    Rows are sorted by matrix, so each matrix that is used is multiplied once.

    Args:
        x: [T, D].
        index: int64 [T], in 0..E-1.
        weights: [E, P, D].

    Returns:
        [T, P] in the dtype of the product; differentiable in x and weights.
    """
    # Either decoding, or a rank without rows: then the gradients exist and are zeros.
    if len(x) <= 1:
        return (x.unsqueeze(1) @ weights[index].mT).squeeze(1)

    order = index.argsort()
    rows_per_matrix = index.bincount(minlength=len(weights)).tolist()
    groups = zip(x[order].split(rows_per_matrix), weights.unbind(0), strict=True)
    out = torch.cat([part @ matrix.T for part, matrix in groups if len(part)])

    # back to the order of x
    return torch.empty_like(out).index_copy(0, order, out)
