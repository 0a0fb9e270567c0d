"""From pure noise to a block of bits (paper, section 3.4): ODE, SDE and left-to-right samplers.

A sampler sees the head only through ``denoisers``: a function from times [S, N, M], or [S, 1, 1] if
all tokens share them, to S functions, each of which maps noisy bits [N, M, K] to A0_hat [N, M, K].
Guidance wraps it. Every sampler takes ``prompt_tokens``: the tokens of a partial block that the
prompt fixes.

Legend: N blocks, M tokens per block, K bits, S steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

DenoiseStep = Callable[[Tensor], Tensor]
Denoisers = Callable[[Tensor], Sequence[DenoiseStep]]
StepCallback = Callable[[int, Tensor], None]
SDE_END = 0.05  # Euler-Maruyama stops here; one exact step completes the block


@dataclass(frozen=True)
class PromptTokens:
    """Tokens that the prompt fixes: bits [N, M, K] where the mask [N, M] is True.

    Without a mask, no token is fixed. The tokens are put in clean at every step. A head trained
    with per-token noise is given t = 0 at them; a head that only knows one time per block is given
    the block's time.
    """

    bits: Tensor
    mask: Tensor | None
    has_per_token_time: bool

    def clamp(self, bits: Tensor) -> Tensor:
        """Overwrite the fixed tokens in ``bits`` [N, M, K]."""
        return bits if self.mask is None else torch.where(self.mask.unsqueeze(-1), self.bits, bits)

    def times_at(self, levels: list[float]) -> Tensor:
        """Times that the head is given at S noise levels, [S, N, M], or [S, 1, 1] if shared."""
        times = torch.tensor(levels, device=self.bits.device)[:, None, None]
        if self.mask is None:
            return times
        times = times.expand(-1, *self.mask.shape)
        return times.masked_fill(self.mask, 0.0) if self.has_per_token_time else times

    def num_in_every_block(self) -> int:
        """Number of positions that are fixed in every block."""
        return 0 if self.mask is None else int(self.mask.flatten(0, -2).all(0).sum())

    def unclamped(self, bits: Tensor) -> Tensor:
        """Select the tokens of ``bits`` that are not fixed."""
        return bits if self.mask is None else bits[~self.mask]

    @classmethod
    def empty(cls, like: Tensor) -> "PromptTokens":
        """Fix no token, on the device of ``like``."""
        return cls(like, None, has_per_token_time=False)


@dataclass(frozen=True)
class SampledBlock:
    """A sampled block.

    Attributes:
        bits: signed bits [N, M, K].
        head_passes: number of head passes that it took.
        denoised: the last A0_hat, from which invalid codes are projected to valid ones.
    """

    bits: Tensor
    head_passes: int
    denoised: Tensor


def sign(bits: Tensor) -> Tensor:
    """Sign with sign(0) = +1."""
    return torch.where(bits >= 0, 1.0, -1.0)


def classifier_free_guidance(
    conditional: Denoisers, unconditional: Denoisers, guidance_scale: float
) -> Denoisers:
    """Guide with u + s·(c - u), where c and u see the same noise."""

    def guide(with_context: DenoiseStep, without: DenoiseStep, noisy: Tensor) -> Tensor:
        """Extrapolate from the unconditional to the conditional estimate."""
        u = without(noisy)
        return u + guidance_scale * (with_context(noisy) - u)

    def denoisers(times: Tensor) -> list[DenoiseStep]:
        """Pair the conditional and unconditional denoisers of each time."""
        return [
            partial(guide, *pair)
            for pair in zip(conditional(times), unconditional(times), strict=True)
        ]

    return denoisers


def ode_sample(
    denoisers: Denoisers,
    initial_noise: Tensor,
    num_steps: int,
    *,
    prompt_tokens: PromptTokens,
    confidence: float | None = None,
    callback: StepCallback | None = None,
) -> SampledBlock:
    """Iterate A <- (t'/t)·A + (1 - t'/t)·A0_hat over t = k/num_steps, k = num_steps..1.

    The last A is A0_hat.

    Args:
        denoisers: the (guided) head.
        initial_noise: Gaussian noise [N, M, K]; its scale is the temperature.
        num_steps: K of the paper, at least 1.
        prompt_tokens: tokens fixed by the prompt.
        confidence: stop early once every |A0_hat| reaches it; None: never.
        callback: called with (step, A0_hat) after every head pass.
    """
    noisy = initial_noise
    remaining_steps = range(num_steps, 0, -1)

    # Fixed tokens are clamped in the input of the head and in its estimate.
    for k, denoise in zip(
        remaining_steps,
        denoisers(prompt_tokens.times_at([k / num_steps for k in remaining_steps])),
        strict=True,
    ):
        denoised = prompt_tokens.clamp(denoise(prompt_tokens.clamp(noisy)))
        if callback:
            callback(num_steps - k + 1, denoised)

        if k == 1 or (
            confidence is not None
            and bool((prompt_tokens.unclamped(denoised).abs() >= confidence).all())
        ):
            break
        noisy = torch.lerp(noisy, denoised, 1 / k)  # 1 - t'/t = 1/k

    return SampledBlock(sign(denoised), num_steps - k + 1, denoised)


def sde_sample(
    denoisers: Denoisers,
    initial_noise: Tensor,
    num_steps: int,
    noise: Callable[[int], Tensor],
    *,
    prompt_tokens: PromptTokens,
    callback: StepCallback | None = None,
) -> SampledBlock:
    """Integrate the reverse SDE from t = 1 to 0.05, then take one exact step to A0_hat.

    The integrator is Euler-Maruyama. The forward process has drift -A/(1-t) and squared diffusion
    2t/(1-t); the score is -(A - (1-t)·A0_hat)/t^2. Near t = 1 the drift is singular, so the first
    step is that of the ODE.

    Args:
        noise: maps the step number to standard normal numbers [N, M, K].
        num_steps: at least 2; the other arguments are those of :func:`ode_sample`.
    """
    times = torch.linspace(1.0, SDE_END, num_steps).tolist()
    noisy = initial_noise
    # the last step goes from SDE_END to zero
    steps_down = zip(
        times, [*times[1:], 0.0], denoisers(prompt_tokens.times_at(times)), strict=True
    )

    for step_index, (t, next_t, denoise) in enumerate(steps_down):
        denoised = prompt_tokens.clamp(denoise(prompt_tokens.clamp(noisy)))
        if callback:
            callback(step_index + 1, denoised)

        # the first and the last step are those of the ODE
        if step_index == 0 or next_t == 0.0:
            noisy = next_t / t * noisy + (1 - next_t / t) * denoised
            continue

        diffusion = 2 * t / (1 - t)
        drift = -noisy / (1 - t) + diffusion * (noisy - (1 - t) * denoised) / t**2
        noisy = noisy - drift * (t - next_t) + (diffusion * (t - next_t)) ** 0.5 * noise(step_index)

    return SampledBlock(sign(denoised), num_steps, denoised)


def sequential_sample(
    sample_token: Callable[[int, Tensor], Tensor],
    initial_bits: Tensor,
    *,
    project_to_valid: Callable[[Tensor], Tensor] = sign,
    prompt_tokens: PromptTokens,
    callback: StepCallback | None = None,
) -> SampledBlock:
    """Sample the tokens of the block from left to right, in M head passes (docs/recipe.md).

    Args:
        sample_token: maps (i, bits [N, M, K]) to the bits of token i [N, K]; the bits are clean
            before position i and ``initial_bits`` from there on.
        initial_bits: bits [N, M, K] before any token is sampled.
        project_to_valid: projects the bits [N, K] of a sampled token to a valid code before the
            next token sees them.
        prompt_tokens, callback: as in :func:`ode_sample`.
    """
    num_tokens = initial_bits.shape[-2]
    first = prompt_tokens.num_in_every_block()  # the fixed tokens come first in the block
    bits = prompt_tokens.clamp(initial_bits)
    position = torch.arange(num_tokens, device=initial_bits.device)

    for i in range(first, num_tokens):
        token_bits = project_to_valid(sample_token(i, bits))
        bits = torch.where((position == i).unsqueeze(-1), token_bits.unsqueeze(1), bits)
        if callback:
            # tokens that are not sampled yet show as zero
            callback(i - first + 1, bits.masked_fill((position > i).unsqueeze(-1), 0.0))

    return SampledBlock(sign(bits), num_tokens - first, bits)
