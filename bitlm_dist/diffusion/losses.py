"""Training objectives on bits, per token and in fp32 (paper, Eq. 12, and its alternatives).

Legend: N blocks (any leading shape), M tokens per block, K bits.
"""

from torch import Tensor

from bitlm_dist.compilation import compiled_region
from bitlm_dist.diffusion.process import time_density

V_TIME_FLOOR = 0.05  # floor of t in the weight of the v loss (BitDance)
ELBO_TIME_FLOOR = 1 / 6  # (1-t)/t = 5: below, the integrand of the bound is negligible


@compiled_region
def x_loss(clean: Tensor, denoised: Tensor) -> Tensor:
    """Mean squared error over the bits [N, M, K] of each token, [N, M] (paper, Eq. 12)."""
    return (clean - denoised).square().mean(-1)


@compiled_region
def v_loss(clean: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
    """Squared error of the velocity: the x loss weighted by 1/max(t, 0.05)^2 (BitDance).

    Args:
        t: [N, M].
    """
    return x_loss(clean, denoised) / t.clamp_min(V_TIME_FLOOR).square()


@compiled_region
def elbo_loss(clean: Tensor, denoised: Tensor, t: Tensor, time_distribution: str) -> Tensor:
    """Unbiased estimate of the bound in nats per bit.

    It is the x loss weighted by (1-t)/t^3 over the density of t.

    Args:
        t: [N, M].
        time_distribution: name of the distribution that t was sampled from.
    """
    weight = (
        (1 - t)
        / t.clamp_min(ELBO_TIME_FLOOR).pow(3)
        * (t >= ELBO_TIME_FLOOR)
        / time_density(t, time_distribution)
    )
    return weight * x_loss(clean, denoised)
