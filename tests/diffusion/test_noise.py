import math

import pytest
import torch

from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import NoiseKey
from bitlm_dist.diffusion.process import NoiseDistribution, sample_noisy, sample_training_noise

# Known answers of Philox4x32-10, published with Random123.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    words = noise.philox4x32(tuple(map(torch.tensor, counter)), key)
    assert tuple(words.tolist()) == expected


def source(**changes):
    return NoiseKey(
        **{
            "seed": 5,
            "step": 7,
            "sequence_index": torch.arange(300),
            "block_index": torch.arange(300) % 7,
            **changes,
        }
    )


def test_uniforms_and_normals_have_their_moments():
    u = source().uniform(noise.NOISE_STREAM, 400)
    n = source().normal(noise.NOISE_STREAM, 400)
    count = u.numel()

    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * count)
    assert abs(n.mean()) < 5 / math.sqrt(count)
    assert abs(n.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((n**4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert abs((n[:, 1:] * n[:, :-1]).mean()) < 5 / math.sqrt(count)


@pytest.mark.parametrize(
    "change", ["seed", "step", "noise_sample_index", "sequence_index", "block_index", "stream"]
)
def test_every_coordinate_changes_every_number(change):
    new = {"seed": 6, "step": 8, "noise_sample_index": 1}.get(change, torch.arange(300) + 1000)
    changes, stream = (
        ({}, noise.TIME_STREAM) if change == "stream" else ({change: new}, noise.NOISE_STREAM)
    )
    other = source(**changes).uniform(stream, 9)
    assert (source().uniform(noise.NOISE_STREAM, 9) == other).float().mean() < 1e-3


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match="seed = -1"):
        source(seed=-1).uniform(noise.NOISE_STREAM, 1)


@pytest.mark.parametrize("pieces", [1, 2, 3, 50])
def test_noise_is_identical_for_any_microbatching(pieces, seed):
    law = NoiseDistribution(
        "logit_normal", num_noise_samples=3, per_token_noise_prob=0.5, context_dropout=0.3
    )
    sample = torch.randint(0, 2**31, (100,))
    block = torch.randint(0, 4096, (100,))
    whole = sample_training_noise(law, (4, 12), NoiseKey(1, sample, block, 9))
    parts = [
        sample_training_noise(law, (4, 12), NoiseKey(1, s, b, 9))
        for s, b in zip(sample.chunk(pieces), block.chunk(pieces), strict=True)
    ]

    for name, of_blocks in (("eps", 1), ("t", 1), ("keep_mask", 0)):
        assert torch.equal(
            torch.cat([getattr(part, name) for part in parts], of_blocks), getattr(whole, name)
        )


def test_training_noise_follows_its_law():
    sample = torch.arange(20_000)
    law = NoiseDistribution(
        "uniform", num_noise_samples=2, per_token_noise_prob=0.6, context_dropout=0.1
    )
    eps, t, keep = sample_training_noise(law, (4, 3), NoiseKey(0, sample, sample % 64))
    own = (t[0] != t[0, :, :1]).any(-1)

    assert abs(own.float().mean() - 0.6) < 0.02
    assert abs((~keep).float().mean() - 0.1) < 0.015
    assert abs(t[0, ~own][:, 0].mean() - 0.5) < 0.02
    assert not torch.equal(eps[0], eps[1])

    clean = torch.randn(len(sample), 4, 3)
    noisy, times, _ = sample_noisy(law, clean, NoiseKey(0, sample, sample % 64))

    assert torch.equal(times, t)
    torch.testing.assert_close(noisy, (1 - t[..., None]) * clean + t[..., None] * eps)
