"""Grouped matrix product: every row is multiplied by a matrix of its choice, as in a mixture of
experts.
"""

import torch
from torch import Tensor

TILE_ROWS = 32  # rows that one matrix is multiplied with at a time


def grouped_matmul(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Multiply row t of x by the transpose of ``weights[index[t]]``.

    The rows of each matrix are laid out in tiles of :data:`TILE_ROWS`, the last of them padded with
    zeros. There is room for the tiles of any ``index``, so no shape depends on its values, and the
    host never waits for a GPU.

    Args:
        x: [T, D].
        index: int64 [T], in 0..E-1.
        weights: [E, P, D].

    Returns:
        [T, P] in the dtype of the product; differentiable in x and weights.
    """
    # decoding
    if len(x) <= 1:
        return (x.unsqueeze(1) @ weights[index].mT).squeeze(1)

    num_rows = len(x)
    slot, tile_matrix = _assign_tiles(index, len(weights))
    num_slots = len(tile_matrix) * TILE_ROWS

    table = x.new_zeros(num_slots, x.shape[1]).index_copy(0, slot, x)
    tiles = table.unflatten(0, (-1, TILE_ROWS))
    # in this order, as the gradient of the selected weights is contiguous then
    products = (weights.index_select(0, tile_matrix) @ tiles.mT).mT

    # Copies back instead of a selection by slot, whose backward pass would add row by row. All
    # padding goes to one more row.
    row = slot.new_full((num_slots,), num_rows).index_copy(
        0, slot, torch.arange(num_rows, device=x.device)
    )
    out = products.new_empty(num_rows + 1, products.shape[-1])
    return out.index_copy(0, row, products.flatten(0, 1))[:-1]


def _assign_tiles(index: Tensor, num_matrices: int) -> tuple[Tensor, Tensor]:
    """Assign every row a slot in the tiles, and every tile a matrix.

    Returns:
        The slot of each row [T], no two of which are equal, and the matrix of each tile. Tiles
        beyond the last one in use have the last matrix.
    """
    num_rows = len(index)
    device = index.device
    sorted_index, order = index.sort()
    row_ends = torch.searchsorted(
        sorted_index, torch.arange(num_matrices, device=device), right=True
    )
    row_starts = torch.cat((row_ends.new_zeros(1), row_ends[:-1]))
    num_tiles_of = (row_ends - row_starts + TILE_ROWS - 1) // TILE_ROWS
    tile_ends = num_tiles_of.cumsum(0)

    # Of the tiles of each matrix, all but one are full.
    num_tiles = min(num_rows, (num_rows + (TILE_ROWS - 1) * num_matrices) // TILE_ROWS)
    tile_matrix = torch.searchsorted(
        tile_ends, torch.arange(num_tiles, device=device), right=True
    ).clamp_max(num_matrices - 1)

    # A row's slot counts from the first tile of its matrix.
    first_slots = (tile_ends - num_tiles_of) * TILE_ROWS - row_starts
    sorted_slots = torch.arange(num_rows, device=device) + first_slots[sorted_index]
    return torch.empty_like(order).index_copy(0, order, sorted_slots), tile_matrix
