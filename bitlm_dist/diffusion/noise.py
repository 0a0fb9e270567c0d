"""Random numbers as a pure function of (seed, step, sequence, block, noise sample): Philox4x32-10.

A counter-based generator has no state: any rank, layout or microbatch that asks for the noise of a
block gets the same values, and a resumed run needs nothing but its step. Source: Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# One independent stream per purpose, so that a new stream never changes the values of another.
NOISE_STREAM, TIME_STREAM, CHOICE_STREAM, BIT_FLIP_STREAM, SAMPLING_STREAM, TEACHER_STREAM = range(
    6
)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor | int], key: tuple[int, int]
) -> Tensor:
    """Run ten Philox rounds on 32-bit words.

    Args:
        counter: four words, in int64 tensors that broadcast. The last may be a plain integer, which
            needs no copy to the device.
        key: two words.

    Returns:
        The four output words, [..., 4].
    """
    c3: Tensor | int
    c0, c1, c2, c3 = counter
    k0, k1 = key

    for _ in range(10):
        # int64 multiplication wraps, so the bits of the unsigned 64-bit product are exact
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK

    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


@dataclass(frozen=True)
class NoiseKey:
    """Key of the random numbers of some blocks.

    Attributes:
        seed: seed of the run, 0 <= seed < 2^32. The same range holds for ``step`` and every
            ``sequence_index`` and ``block_index``.
        sequence_index: global index of each block's sequence, int64 [N] (any shape).
        block_index: index of each block in its sequence, int64 [N].
        step: the training step; elsewhere a running number.
        noise_sample_index: index of the noise sample within a step.
    """

    seed: int
    sequence_index: Tensor
    block_index: Tensor
    step: int = 0
    noise_sample_index: int = 0

    def replace(
        self, *, step: int | None = None, noise_sample_index: int | None = None
    ) -> "NoiseKey":
        """Return the key of the same blocks at another step or noise sample."""
        return replace(
            self,
            step=self.step if step is None else step,
            noise_sample_index=self.noise_sample_index
            if noise_sample_index is None
            else noise_sample_index,
        )

    def uniform(self, stream: int, count: int) -> Tensor:
        """Sample uniform numbers in the open interval (0, 1).

        Args:
            stream: one of the streams of this module.
            count: numbers per block, less than 2^26.

        Returns:
            float32 [N, count].

        Raises:
            ValueError: the seed is out of range.
        """
        if not 0 <= self.seed <= _MASK:
            raise ValueError(f"seed = {self.seed}: expected 0 <= seed < 2^32")

        # Each Philox call yields four words; the stream occupies the bits above their counter.
        quads = torch.arange(-(-count // 4), device=self.sequence_index.device)
        sequence_index, block_index = torch.broadcast_tensors(
            self.sequence_index.unsqueeze(-1), self.block_index.unsqueeze(-1)
        )
        bits = philox4x32(
            (quads | stream << 24, block_index, sequence_index, self.step),
            (self.seed, self.noise_sample_index),
        )

        # 24 bits fill a float32 mantissa; the half keeps 0 and 1 out
        return (((bits >> 8).float() + 0.5) * 2.0**-24).flatten(-2)[..., :count]

    def normal(self, stream: int, count: int) -> Tensor:
        """Sample standard normal numbers, float32 [N, count]; arguments as in :meth:`uniform`."""
        half = -(-count // 2)

        # Box-Muller in fp64: vectorised fp32 functions may round an element differently depending
        # on its position in the tensor
        u = self.uniform(stream, 2 * half).double()
        radius = torch.sqrt(-2 * torch.log(u[..., :half]))
        angle = 2 * math.pi * u[..., half:]
        normal = torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), -1)
        return normal[..., :count].float()
