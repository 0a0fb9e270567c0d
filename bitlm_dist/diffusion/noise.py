"""Random numbers as a pure function of (seed, step, sample, block, draw): Philox4x32-10, vectorised.

A counter-based generator needs no state: any rank, layout or microbatch that asks for a block's noise gets the same numbers,
and a resumed run needs nothing but its step. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# One independent stream a purpose, so that adding one never changes the numbers of another.
NOISE, TIME, CHOICES, BIT_FLIPS, SAMPLING = range(5)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Ten Philox rounds on 32-bit words held in int64 tensors that broadcast; returns the four words, [..., 4]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 multiplication wraps, so the unsigned 64-bit product is exact in its bits
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def uniforms(
    count: int, *, seed: int, purpose: int, step: int, sample: Tensor, block: Tensor, draw: int = 0
) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        count: numbers wanted for each (sample, block), below 2^26.
        seed: run seed, 0 <= seed < 2^32; likewise ``step`` and every ``sample`` and ``block``.
        purpose: one of the streams named in this module.
        sample: global sample index, int64, broadcasts with ``block``: [...].
        block: index of the block in its sample, int64.
        draw: which of several noise draws of one step.

    Returns:
        float32 [..., count].
    """
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed = {seed}: expected 0 <= seed < 2^32")
    quads = torch.arange(-(-count // 4), device=sample.device)
    sample, block = torch.broadcast_tensors(sample, block)
    word = (quads | purpose << 24, block.unsqueeze(-1), sample.unsqueeze(-1), quads.new_tensor(step))
    bits = philox4x32(word, (quads.new_tensor(seed), quads.new_tensor(draw)))
    # 24 bits fill a float32 mantissa; the half keeps 0 and 1 out
    return (((bits >> 8).float() + 0.5) * 2.0**-24).flatten(-2)[..., :count]


def normals(
    count: int, *, seed: int, purpose: int, step: int, sample: Tensor, block: Tensor, draw: int = 0
) -> Tensor:
    """Standard normal numbers, float32 [..., count]; arguments as in :func:`uniforms`."""
    half = -(-count // 2)
    u = uniforms(2 * half, seed=seed, purpose=purpose, step=step, sample=sample, block=block, draw=draw)
    radius = torch.sqrt(-2 * torch.log(u[..., :half]))  # Box-Muller
    angle = 2 * math.pi * u[..., half:]
    return torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), -1)[..., :count]
