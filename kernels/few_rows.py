"""Matrix products with a handful of rows on a CPU, as in decoding: their cost is to read the weights once.

``x @ W.T`` with one row is one thread's work in BLAS, with several it reads the weights once a row. So one row is multiplied by
slices of W side by side, and several are turned round. Measured with MKL on two cores of an AMD EPYC, weights larger than the
cache: one row 3 times as fast (34 of the 35 GB/s that the memory gives), four rows 2.2 times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 4
LARGE = 2**15  # numbers of a matrix from which the extra steps pay
SLICES = 16  # enough to share among threads


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the transpose of weight [N, K], plus bias [N]; another way than torch's for few rows, see above.

    x comes in any dtype; the product and the result have the weight's.
    """
    x = x.to(weight.dtype)
    count = x.numel() // x.shape[-1]
    if not 0 < count <= FEW_ROWS or weight.numel() < LARGE or x.is_cuda or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    rows = x.reshape(count, -1).contiguous()  # turned twice is slow: the product before may have left it turned
    out = _one_row(rows, weight) if count == 1 else torch.mm(weight, rows.t()).t().contiguous()
    out = out.view(*x.shape[:-1], len(weight))
    return out if bias is None else out + bias


def _one_row(row: Tensor, weight: Tensor) -> Tensor:
    whole = len(weight) // SLICES * SLICES
    out = torch.bmm(weight[:whole].unflatten(0, (SLICES, -1)), row.t().expand(SLICES, -1, -1)).view(1, whole)
    return out if whole == len(weight) else torch.cat((out, row @ weight[whole:].t()), 1)


class Linear(nn.Linear):
    """torch's linear layer on :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N]."""
        return linear(input, self.weight, self.bias)
