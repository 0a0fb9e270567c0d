from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlm_dist.parallel.sharded_tensor import ShardedTensor

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(torch.Size)


def assembled(parts):
    """Reassemble a tensor from the shards of several ranks; -1 where no rank holds an element."""
    found = torch.full(parts[0].shape, -1.0)
    for part in parts:
        for piece in part.shards:
            place = tuple(
                slice(a, a + n) for a, n in zip(piece.offsets, piece.tensor.shape, strict=True)
            )
            assert (found[place] == -1).all(), "held twice"
            found[place] = piece.tensor

    return found


@given(SHAPES, st.data())
def test_ranges_of_a_flattened_tensor_make_it_whole(shape, data):
    whole = torch.arange(float(shape.numel())).view(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, shape.numel()), max_size=4)))
    flat = whole.flatten()
    ends = [0, *cuts, shape.numel()]
    parts = [ShardedTensor.from_flat_range(shape, a, flat[a:b]) for a, b in pairwise(ends)]

    assert torch.equal(assembled(parts), whole)
    for part in parts:
        assert len(part.shards) <= max(1, 2 * len(shape) - 1)


def test_slices_are_views():
    flat = torch.zeros(10)
    for piece in ShardedTensor.from_flat_range(torch.Size((3, 5)), 2, flat).shards:
        piece.tensor.fill_(1.0)
    assert flat.all()


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 1), st.data())
def test_halves_and_shares_come_together(rows, columns, ranks, dimension, data):
    """Two tensors concatenated on every rank, each a shard along a dimension.

    A rank holds a range of its own flattened tensors.
    """
    size = (rows * ranks, columns) if dimension == 0 else (rows, columns * ranks)
    wholes = [torch.arange(float(rows * columns * ranks)).view(size) + 100 * i for i in range(2)]
    found = [[], []]
    for rank, shares in enumerate(zip(*(w.chunk(ranks, dimension) for w in wholes), strict=True)):
        local = torch.cat(shares)
        cut = data.draw(st.integers(0, local.numel()))
        for first, flat in ((0, local.flatten()[:cut]), (cut, local.flatten()[cut:])):
            held = ShardedTensor.from_flat_range(local.shape, first, flat)
            for half in range(2):
                found[half].append(
                    held.slice_rows(half * rows, (half + 1) * rows).as_shard_of(
                        dimension, rank, ranks
                    )
                )

    for half in range(2):
        assert torch.equal(assembled(found[half]), wholes[half])
