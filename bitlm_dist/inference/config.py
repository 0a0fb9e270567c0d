"""Config keys of generation, and their rules."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from bitlm_dist.config_section import Resume, Section, Trained
from bitlm_dist.model.config import DiffusionConfig


class SamplingConfig(Section):
    """Options of `bitlm generate`."""

    marks = (Resume.FREE, Trained.FREE)

    sampler: Literal["ode", "sde", "sequential"] = "sequential"
    """Sampler.

    sequential needs blocks of one token, or a head trained with
    diffusion.autoregressive_loss_weight or diffusion.per_token_noise_prob > 0.
    """
    steps: int = Field(8, ge=1)
    """ode, sde: number of denoising steps (K)."""
    guidance: float = Field(1.0, ge=0)
    """ode, sde: scale of classifier-free guidance; 1 disables."""
    temperature: float = Field(0.8, ge=0)
    """Scale of the initial noise (ode, sde) or divisor of the logits (sequential)."""
    confidence: float | None = Field(None, gt=0)
    """ode: stop early once all |A0_hat| of a block reach this, e.g. 0.99. null: never."""

    def problems(self) -> Iterator[str]:
        """Options that the sampler does not have."""
        if self.guidance != 1 and self.sampler == "sequential":
            yield (
                f"sampling.guidance = {self.guidance} works with sampling.sampler = ode or sde, "
                "not with sequential"
            )
        if self.sampler == "sde" and self.steps < 2:
            yield f"sampling.steps = {self.steps}: the sde sampler needs at least 2"


def sampling_problems(
    sampling: SamplingConfig, diffusion: DiffusionConfig, block_size: int
) -> Iterator[str]:
    """Samplers that the head is not trained for."""
    # Guidance extrapolates from the prediction of the null state, which only dropout trains.
    if sampling.guidance != 1 and diffusion.context_dropout == 0:
        yield (
            f"sampling.guidance = {sampling.guidance} needs a trained null state: "
            "set diffusion.context_dropout, e.g. 0.1"
        )

    # This sampler denoises a token while those before it are clean. Only these objectives teach it.
    if (
        sampling.sampler == "sequential"
        and block_size > 1
        and not (diffusion.autoregressive_loss_weight or diffusion.per_token_noise_prob)
    ):
        yield (
            "sampling.sampler = sequential needs a head trained with "
            "diffusion.autoregressive_loss_weight or diffusion.per_token_noise_prob > 0: use ode"
        )
