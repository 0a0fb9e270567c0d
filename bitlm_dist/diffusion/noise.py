"""Random numbers as a pure function of (seed, step, sample, block, draw): Philox4x32-10, vectorised.

A counter-based generator needs no state: any rank, layout or microbatch that asks for a block's noise gets the same numbers,
and a resumed run needs nothing but its step. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# One independent stream a purpose, so that adding one never changes the numbers of another.
NOISE, TIME, CHOICES, BIT_FLIPS, SAMPLING, TEACHER = range(6)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor | int], key: tuple[int, int]) -> Tensor:
    """Ten Philox rounds on 32-bit words, held in int64 tensors that broadcast; returns the four words, [..., 4].

    What is the same everywhere may be a plain integer: nothing is copied to the device for it.
    """
    c3: Tensor | int
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


@dataclass(frozen=True)
class Source:
    """Names the random numbers of some blocks.

    Attributes:
        seed: of the run, 0 <= seed < 2^32; the same range holds for ``step`` and every ``sample`` and ``block``.
        sample: global sample index of each block, int64 [N] (any shape).
        block: index of each block in its sample, int64 [N].
        step: of training; elsewhere a running number.
        draw: which of several draws of one step.
    """

    seed: int
    sample: Tensor
    block: Tensor
    step: int = 0
    draw: int = 0

    def at(self, *, step: int | None = None, draw: int | None = None) -> "Source":
        """The same blocks at another step or draw."""
        return replace(self, step=self.step if step is None else step, draw=self.draw if draw is None else draw)

    def uniforms(self, purpose: int, count: int) -> Tensor:
        """Uniform numbers in the open interval (0, 1), float32 [N, count], of one of this module's streams; count < 2^26.

        Raises:
            ValueError: the seed is out of range.
        """
        if not 0 <= self.seed <= _MASK:
            raise ValueError(f"seed = {self.seed}: expected 0 <= seed < 2^32")
        quads = torch.arange(-(-count // 4), device=self.sample.device)
        sample, block = torch.broadcast_tensors(self.sample.unsqueeze(-1), self.block.unsqueeze(-1))
        bits = philox4x32((quads | purpose << 24, block, sample, self.step), (self.seed, self.draw))
        # 24 bits fill a float32 mantissa; the half keeps 0 and 1 out
        return (((bits >> 8).float() + 0.5) * 2.0**-24).flatten(-2)[..., :count]

    def normals(self, purpose: int, count: int) -> Tensor:
        """Standard normal numbers, float32 [N, count]; arguments as in :meth:`uniforms`."""
        half = -(-count // 2)
        # Box-Muller in fp64: vectorised fp32 functions may round an element differently by its place in the tensor
        u = self.uniforms(purpose, 2 * half).double()
        radius = torch.sqrt(-2 * torch.log(u[..., :half]))
        angle = 2 * math.pi * u[..., half:]
        return torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), -1)[..., :count].float()
