"""One attention backend against the fp64 reference: `python -m bitlm_dist.acceptance.kernels NAME
DTYPES HEAD_DIMS`, as JSON.

Forward and backward, one document per row and several, heads in groups, every block size. The name
``inside-blocks`` stands for attention inside blocks.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from bitlm_dist.acceptance.sizes import BLOCK_SIZES, INSIDE_BLOCKS
from bitlm_dist.kernels import attention
from bitlm_dist.kernels.attention_inputs import validate_inputs
from bitlm_dist.kernels.bench import default_device
from bitlm_dist.kernels.self_check import attention_mismatch, in_block_mismatch
from bitlm_dist.strict_json import to_json


def check_backend(name: str, dtypes: list[str], head_dims: list[int]) -> dict[str, Any]:
    """Compare a backend with the reference in all cases.

    Returns:
        ``num_cases`` that were compared, ``mismatches`` and ``not_supported``: a reason by case.
    """
    found: dict[str, Any] = {"num_cases": 0, "mismatches": {}, "not_supported": {}}
    for dtype, head_dim, block in _cases(dtypes, head_dims):
        case = f"{dtype}, head dim {head_dim}, block {block}"
        if name == INSIDE_BLOCKS:
            mismatch = in_block_mismatch(_empty((4, block, 3, 4, head_dim), dtype))
        else:
            q, k, v = (_empty((1, count, 64, head_dim), dtype) for count in (4, 2, 2))
            inputs = validate_inputs(q, k, v, block)
            reason = attention.unavailable_reason(name) or attention.unsupported_reason(
                name, inputs
            )
            if reason is not None:
                found["not_supported"][case] = reason
                continue
            mismatch = attention_mismatch(name, inputs)

        found["num_cases"] += 1
        if mismatch is not None:
            found["mismatches"][case] = mismatch
    return found


def _cases(dtypes: list[str], head_dims: list[int]) -> Iterator[tuple[str, int, int]]:
    for dtype in dtypes:
        for head_dim in head_dims:
            for block in BLOCK_SIZES:
                yield dtype, head_dim, block


def _empty(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.zeros(
        shape, dtype=getattr(torch, dtype), device=default_device(), requires_grad=True
    )


if __name__ == "__main__":
    backend, names, dims = sys.argv[1:]
    print(to_json(check_backend(backend, names.split(","), [int(d) for d in dims.split(",")])))
