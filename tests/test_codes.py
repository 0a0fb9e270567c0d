import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlm_dist import codes
from bitlm_dist.codes import ESTIMATE_GRID, BitCodes, num_bits_needed


def counts_of(vocabulary):
    return torch.randint(0, 1000, (vocabulary,), generator=torch.Generator().manual_seed(1))


def assignments(vocabulary):
    bits = num_bits_needed(vocabulary)
    yield "natural", codes.natural_codes(vocabulary)
    yield "gray", codes.gray_codes(vocabulary)
    yield "random", codes.random_codes(vocabulary, bits, seed=3)
    yield "frequency", codes.frequency_codes(counts_of(vocabulary))
    vectors = torch.randn(vocabulary, 4, generator=torch.Generator().manual_seed(2))
    yield "octave", codes.octave_codes(counts_of(vocabulary), vectors)


@pytest.mark.parametrize("vocabulary", [2, 3, 4096, 151_669, 262_144])
def test_every_assignment_is_a_bijection(vocabulary):
    ids = torch.arange(vocabulary)
    for name, table in assignments(vocabulary):
        code = BitCodes(table, num_bits_needed(vocabulary))
        assert torch.equal(code.bits_to_ids(code.ids_to_bits(ids)), ids), name
        assert set(code.ids_to_bits(ids[:100]).unique().tolist()) <= {-1.0, 1.0}


def test_natural_code_is_the_binary_of_the_id_with_bit_0_first():
    code = BitCodes(codes.natural_codes(8), 3)
    assert code.ids_to_bits(torch.tensor([6])).tolist() == [[-1.0, 1.0, 1.0]]


def test_gray_neighbours_differ_in_one_bit():
    code = BitCodes(codes.gray_codes(1024), 10)
    bits = code.ids_to_bits(torch.arange(1024))
    assert ((bits[1:] != bits[:-1]).sum(-1) == 1).all()


@pytest.mark.parametrize("kind", ["frequency", "octave"])
def test_ranked_codes_leave_the_unused_ones_as_one_top_range(kind):
    table = dict(assignments(3000))[kind]
    assert table.max() == 2999


def test_octave_keeps_the_octave_of_the_rank_and_groups_alike_contexts():
    counts = torch.arange(64, 0, -1)  # rank = id
    vectors = torch.zeros(64, 2)
    # odd and even ids occur in different contexts
    vectors[:, 0] = torch.tensor([1.0, -1.0]).repeat(32)
    table = codes.octave_codes(counts, vectors)
    ids = torch.arange(1, 64)

    assert torch.equal(table[1:].float().log2().floor(), ids.float().log2().floor())

    # the bit below the leading one separates the two contexts
    half = table[32:64] - 32 >= 16
    assert len(half[::2].unique()) == 1
    assert len(half[1::2].unique()) == 1
    assert half[0] != half[1]


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(0, 2**31))
def test_projection_is_exact(vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = num_bits_needed(vocabulary) + 1  # at least half of all codes are invalid
    code = BitCodes(codes.random_codes(vocabulary, bits, seed), bits)
    estimate = torch.randn(64, bits, generator=generator)
    scores = estimate @ code.ids_to_bits(torch.arange(vocabulary)).T
    best = scores.max(-1).values
    got = scores.gather(-1, code.nearest_ids(estimate).unsqueeze(-1)).squeeze(-1)

    # rounding shifts each score by at most half a grid step per bit
    torch.testing.assert_close(got, best, rtol=0, atol=bits / ESTIMATE_GRID)


def test_rounding_of_the_estimate_does_not_choose_among_ties():
    code = BitCodes(codes.natural_codes(20), 5)
    # flipping the last bit makes most of these codes invalid
    saturated = code.ids_to_bits(torch.arange(20)[::2]) * torch.tensor([1.0, 1, 1, 1, -1])
    jitter = 1e-6 * torch.rand(100, 10, 5, generator=torch.Generator().manual_seed(0))

    assert torch.equal(
        code.nearest_ids(saturated * (1 - jitter)), code.nearest_ids(saturated).expand(100, 10)
    )


def test_projection_keeps_valid_codes_and_zero_counts_as_plus():
    code = BitCodes(codes.natural_codes(6), 3)
    ids = torch.arange(6)
    assert torch.equal(code.nearest_ids(0.01 * code.ids_to_bits(ids)), ids)
    assert code.bits_to_ids(torch.tensor([0.0, -1.0, -1.0])) == 1


def test_too_few_bits_and_double_codes_are_refused():
    with pytest.raises(
        ValueError, match=r"model.bits = 3 gives 8 codes, too few for 9 tokens: use 4"
    ):
        BitCodes(codes.natural_codes(9), 3)
    with pytest.raises(ValueError, match="bijection"):
        BitCodes(torch.tensor([0, 1, 1]), 2)
