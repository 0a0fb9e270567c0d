import pytest
import torch

from bitlm_dist.parallel import partition
from bitlm_dist.parallel.partition import ParamRange, Partition, assign_owners, map_full_tensors
from bitlm_dist.training.optimizers.muon import orthogonalize_flops


def whole(name, shape):
    tensor = torch.randn(shape)
    return Partition(tensor, [ParamRange(name, tensor.shape, [slice(0, tensor.numel())])])


def test_tensors_are_mapped_in_rounds_of_bounded_size(monkeypatch, seed):
    monkeypatch.setattr(partition, "ROUND_NUMEL", 100)
    shapes = [(8, 9), (30, 10), (3, 4), (2, 6, 10), (50,)]
    partitions = [whole(str(i), shape) for i, shape in enumerate(shapes)]
    tensors = [p.flat.clone() for p in partitions]
    rounds = []

    def double(full):
        rounds.append([x.numel() for x in full])
        return [2 * x for x in full]

    map_full_tensors(partitions, tensors, double, torch.Size.numel, torch.float32)
    for p, tensor in zip(partitions, tensors, strict=True):
        assert torch.equal(tensor, 2 * p.flat)
    assert sorted(n for numels in rounds for n in numels) == sorted(
        p.flat.numel() for p in partitions
    )
    # a round takes no further tensor once it is full
    assert len(rounds) > 1
    assert all(sum(numels) - min(numels) < 100 for numels in rounds)


def test_the_full_tensors_of_a_flat_partition_are_mapped_one_by_one(seed):
    shapes = [torch.Size((4, 6)), torch.Size((5,))]
    ranges = [ParamRange.contiguous("a", shapes[0], 0, 1, 29)]
    ranges.append(ParamRange.contiguous("b", shapes[1], 24, 1, 29))
    flat = torch.randn(29)
    result = flat.clone()

    def halve_and_check(full):
        assert [x.shape for x in full] == shapes
        return [x / 2 for x in full]

    map_full_tensors(
        [Partition(flat, ranges)], [result], halve_and_check, torch.Size.numel, torch.float64
    )
    assert torch.equal(result, flat / 2)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_owners_share_the_flops_of_muon(num_ranks):
    """Matrices of BitLM-8B: none of the tensor ranks has more than 1.1 times its share."""
    shapes = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)] * 36
    costs = [orthogonalize_flops(torch.Size(shape)) for shape in shapes]
    owners = assign_owners(costs, num_ranks)
    loads = [
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank)
        for rank in range(num_ranks)
    ]
    assert sum(loads) == sum(costs)
    assert max(loads) <= 1.1 / num_ranks * sum(costs)


def test_ranks_beyond_the_number_of_items_own_nothing():
    assert assign_owners([3, 5, 4], 5) == [2, 0, 1]
    assert assign_owners([], 2) == []


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 3, 7)])
def test_flops_of_orthogonalize_are_those_of_its_products(shape):
    from torch.utils.flop_counter import FlopCounterMode

    from bitlm_dist.training.optimizers.muon import orthogonalize

    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(shape).reshape(-1, *shape[-2:]))
    assert counter.get_total_flops() == orthogonalize_flops(torch.Size(shape))
