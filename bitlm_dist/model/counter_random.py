"""Random numbers as a pure function of a key and a counter: SplitMix64, without any state.

Every operation is exact or correctly rounded (integers; fp32 sums, products, quotients and roots),
so an element has the same bits on CPUs and GPUs, and in a tensor of any shape. That is also why
logarithm, sine and cosine are polynomials: torch's own round differently between devices, and even
between positions in a tensor. Source of the generator: Steele et al., "Fast splittable pseudorandom
number generators" (OOPSLA 2014).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_MAX_INT32 = 2**31 - 1

# of fp32
_MANTISSA_BITS = 23
_EXPONENT_BIAS = 127

# Taylor coefficients; the rest is below the rounding of fp32
_ARTANH = [1 / (2 * k + 1) for k in range(5)]  # of artanh(x) / x in x², for |x| < 0.18
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(9)]  # of cos(x) in x², for |x| <= pi
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)]  # of sin(x) / x, likewise


def random_words(key: int, counter: Tensor) -> Tensor:
    """Compute outputs of SplitMix64, each as two words, the low one first.

    Args:
        key: seed of the generator, 64 bits.
        counter: indices of its outputs from 0, int64 [..., P]; overwritten.

    Returns:
        int32 [..., 2P].
    """
    state = counter.add_(1).mul_(_as_int64(_GOLDEN_GAMMA)).add_(_as_int64(key))
    scratch = torch.empty_like(state)
    for shift, multiplier in _MIXING:
        _xor_with_shifted(state, shift, scratch).mul_(_as_int64(multiplier))
    return _xor_with_shifted(state, _LAST_SHIFT, scratch).view(torch.int32)


def _as_int64(unsigned: int) -> int:
    return unsigned - (unsigned >> 63 << 64)


def _xor_with_shifted(x: Tensor, shift: int, scratch: Tensor) -> Tensor:
    """Compute x ^ (x >> shift) in place, with zeros shifted in."""
    torch.bitwise_right_shift(x, shift, out=scratch)
    return x.bitwise_xor_(scratch.bitwise_and_(2 ** (64 - shift) - 1))


def uniform(words: Tensor) -> Tensor:
    """Map random words [...] to uniform numbers in [-1, 1], fp32 [...]."""
    return words.float().mul_(2.0**-31)


def normal(words: Tensor) -> Tensor:
    """Map pairs of random words [..., 2P] to standard normal numbers, fp32 [..., 2P]: Box-Muller.

    None is larger than 6.6 in magnitude.
    """
    first, second = words.unflatten(-1, (-1, 2)).unbind(-1)
    radius = _root_of_minus_2_log((first & _MAX_INT32).float().add_(1))

    angle = second.float().mul_(math.pi * 2.0**-31)
    square = angle * angle
    cosine = _polynomial(square, _COS).mul_(radius)
    sine = _polynomial(square, _SIN).mul_(angle).mul_(radius)
    return torch.stack((cosine, sine), -1).flatten(-2)


def _root_of_minus_2_log(x: Tensor) -> Tensor:
    """Compute sqrt(-2 log(x / 2^31)) of 1 <= x <= 2^31."""
    bits = x.view(torch.int32)
    exponent = (bits >> _MANTISSA_BITS) - _EXPONENT_BIAS
    mantissa_bits = bits & (2**_MANTISSA_BITS - 1) | _EXPONENT_BIAS << _MANTISSA_BITS
    mantissa = mantissa_bits.view(torch.float32)  # in [1, 2)

    # log(mantissa / sqrt(2)) = 2 artanh(ratio)
    ratio = (mantissa - math.sqrt(2)).div_(mantissa + math.sqrt(2))
    artanh = _polynomial(ratio * ratio, _ARTANH).mul_(ratio)
    minus_2_log = (30.5 - exponent.float()).mul_(2 * math.log(2)).sub_(artanh.mul_(4))
    return minus_2_log.clamp_min_(0).sqrt_()


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value.mul_(x).add_(coefficient)
    return value
