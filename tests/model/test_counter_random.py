"""SplitMix64 in tensors, and the distributions made from its words."""

import math
import random

import pytest
import torch
from goodness_of_fit import kolmogorov_smirnov

from bitlm_dist.model import counter_random

MASK = 2**64 - 1
# `SplittableRandom` of Java, from the seeds 1234567 and 0
PUBLISHED = {
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC],
}


def splitmix64(key, index):
    """Output ``index`` of the generator, in Python's integers."""
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def outputs(key, indices):
    words = counter_random.random_words(key, torch.tensor(indices)).view(-1, 2).tolist()
    return [(low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32 for low, high in words]


@pytest.mark.parametrize("key", PUBLISHED)
def test_outputs_are_the_published_ones(key):
    assert outputs(key, list(range(len(PUBLISHED[key])))) == PUBLISHED[key]


def test_outputs_are_those_of_integer_arithmetic(seed):
    rng = random.Random(seed)
    for key in (0, MASK, 2**63, rng.getrandbits(64)):
        indices = [0, 1, 2**40, 2**62, *(rng.getrandbits(62) for _ in range(50))]
        assert outputs(key, indices) == [splitmix64(key, index) for index in indices]


def test_distributions(seed):
    count = 2**20
    words = counter_random.random_words(seed, torch.arange(count // 2))
    normal = counter_random.normal(words)
    uniform = counter_random.uniform(words)

    assert abs(float(normal.double().mean())) < 5 / math.sqrt(count)
    assert abs(float(normal.double().var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((normal.double() ** 4).mean()) - 3) < 5 * math.sqrt(96 / count)
    assert kolmogorov_smirnov(normal, torch.special.ndtr) < 2.5

    assert float(uniform.abs().max()) <= 1
    assert kolmogorov_smirnov(uniform, lambda x: (x + 1) / 2) < 2.5

    # neither a pair nor neighbouring pairs are correlated, nor their squares
    for x in (normal.double(), uniform.double()):
        for lag in (1, 2, 3):
            for y in (x, x * x):
                y = (y - y.mean()) / y.std()
                assert abs(float((y[:-lag] * y[lag:]).mean())) < 5 / math.sqrt(count)


def test_normal_numbers_are_those_of_box_and_muller_in_fp64(seed):
    extremes = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 2**24, 2**30], dtype=torch.int32)
    words = torch.cat(
        (
            torch.cartesian_prod(extremes, extremes).flatten(),
            counter_random.random_words(seed, torch.arange(2**16)),
        )
    )
    first, second = words.view(-1, 2).unbind(-1)
    u = ((first & 2**31 - 1).double() + 1).float().double() / 2**31
    angle = second.double() * math.pi / 2**31
    expected = (-2 * u.log()).sqrt()[:, None] * torch.stack((angle.cos(), angle.sin()), -1)

    # what cancels near u = 1 is a radius close to zero
    found = counter_random.normal(words).double()
    torch.testing.assert_close(found, expected.flatten(), rtol=3e-6, atol=1e-3)
    large = expected.norm(dim=-1) > 0.1
    torch.testing.assert_close(found.view(-1, 2)[large], expected[large], rtol=3e-6, atol=6e-6)


def test_an_element_does_not_depend_on_its_position_in_a_tensor(seed):
    """torch's own logarithm and cosine would fail this where they round the end otherwise."""
    words = counter_random.random_words(seed, torch.arange(1000))
    full = counter_random.normal(words)
    for start, stop in ((0, 2), (2, 6), (6, 36), (998, 1000), (38, 1962)):
        assert torch.equal(counter_random.normal(words[start:stop].clone()), full[start:stop])
    assert torch.equal(counter_random.normal(words.view(8, -1)).flatten(), full)
