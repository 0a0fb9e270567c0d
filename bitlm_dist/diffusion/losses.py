"""Training objectives on bits, per token and in fp32 (paper, Eq. 12, and its alternatives).

Legend: N blocks (any leading shape), M tokens a block, K bits.
"""

import torch.nn.functional as F
from torch import Tensor

from bitlm_dist.compilation import region
from bitlm_dist.diffusion.process import time_density

V_TIME_FLOOR = 0.05  # floor of t in the weight of the v loss (BitDance)
ELBO_TIME_FLOOR = 1 / 6  # (1-t)/t = 5: below, the bound's integrand is negligible


@region
def x_loss(clean: Tensor, denoised: Tensor) -> Tensor:
    """Mean squared error over the bits of each token: [N, M, K] twice -> [N, M] (paper, Eq. 12)."""
    return (clean - denoised).square().mean(-1)


@region
def v_loss(clean: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
    """The x loss weighted by 1/max(t, 0.05)^2, that is the error of the velocity (BitDance); t [N, M]."""
    return x_loss(clean, denoised) / t.clamp_min(V_TIME_FLOOR).square()


@region
def elbo_loss(clean: Tensor, denoised: Tensor, t: Tensor, law: str) -> Tensor:
    """The x loss weighted by (1-t)/t^3 over the density of t: an unbiased estimate of the bound in nats a bit.

    ``law`` names the distribution that t was drawn from.
    """
    weight = (1 - t) / t.clamp_min(ELBO_TIME_FLOOR).pow(3) * (t >= ELBO_TIME_FLOOR) / time_density(t, law)
    return weight * x_loss(clean, denoised)


@region
def bce_loss(clean: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of each bit in nats, averaged over the bits of a token; logits of the bit being +1."""
    return F.softplus(-clean * logits).mean(-1)
