"""From pure noise to a block of bits (paper, section 3.4): ODE, SDE and, for per-token noise, left to right.

A sampler sees the head only through ``denoisers``: times [S, N, M], or [S, 1, 1], one for all -> for each of the S steps a function
noisy [N, M, K] -> A0_hat [N, M, K]. Guidance wraps it.
Every sampler takes ``known``: the tokens of an open block that the prompt already fixes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]
Denoisers = Callable[[Tensor], Sequence[Step]]
Watcher = Callable[[int, Tensor], None]
SDE_END = 0.05  # Euler-Maruyama stops here; one exact step does the rest


@dataclass(frozen=True)
class Known:
    """Tokens that the prompt fixes: bits [N, M, K] where mask [N, M]; no mask: none.

    They are put in clean at every step. A head trained with per-token noise is told so (t = 0 at them); a head that only knows
    one time a block gets the block's.
    """

    bits: Tensor
    mask: Tensor | None
    clean_time: bool

    def put(self, bits: Tensor) -> Tensor:
        """``bits`` with the known tokens in their places."""
        return bits if self.mask is None else torch.where(self.mask.unsqueeze(-1), self.bits, bits)

    def times(self, levels: list[float]) -> Tensor:
        """The times that the head is told at S noise levels: [S, N, M], or one for all [S, 1, 1]."""
        times = torch.tensor(levels, device=self.bits.device)[:, None, None]
        if self.mask is None:
            return times
        times = times.expand(-1, *self.mask.shape)
        return times.masked_fill(self.mask, 0.0) if self.clean_time else times

    def count(self) -> int:
        """How many tokens are known in every block."""
        return 0 if self.mask is None else int(self.mask.flatten(0, -2).all(0).sum())

    def open(self, bits: Tensor) -> Tensor:
        """Those of ``bits`` that are not known."""
        return bits if self.mask is None else bits[~self.mask]

    @classmethod
    def none(cls, like: Tensor) -> "Known":
        """No token known; ``like`` tells the device."""
        return cls(like, None, clean_time=False)


@dataclass(frozen=True)
class Sampled:
    """A block of signed bits [N, M, K], the head passes that made it, and the last A0_hat, which invalid codes are projected by."""

    bits: Tensor
    head_passes: int
    denoised: Tensor


def sign(bits: Tensor) -> Tensor:
    """Sign with sign(0) = +1."""
    return torch.where(bits >= 0, 1.0, -1.0)


def guided(conditional: Denoisers, unconditional: Denoisers, scale: float) -> Denoisers:
    """Classifier-free guidance u + s·(c - u), both on the same noise."""

    def guide(with_context: Step, without: Step, noisy: Tensor) -> Tensor:
        u = without(noisy)
        return u + scale * (with_context(noisy) - u)

    def denoisers(times: Tensor) -> list[Step]:
        return [partial(guide, *pair) for pair in zip(conditional(times), unconditional(times), strict=True)]

    return denoisers


def ode_sample(
    denoisers: Denoisers,
    start: Tensor,
    steps: int,
    *,
    known: Known,
    confidence: float | None = None,
    watch: Watcher | None = None,
) -> Sampled:
    """A <- (t'/t)·A + (1 - t'/t)·A0_hat over t = k/steps, k = steps..1; the last A is A0_hat.

    Args:
        denoisers: the (guided) head.
        start: Gaussian noise [N, M, K]; its scale is the temperature.
        steps: K of the paper, at least 1.
        known: tokens fixed by the prompt.
        confidence: stop early once every |A0_hat| reaches it; None: never.
        watch: called with (step, A0_hat) after every head pass.
    """
    noisy = start
    left = range(steps, 0, -1)
    for k, denoise in zip(left, denoisers(known.times([k / steps for k in left])), strict=True):
        denoised = known.put(denoise(known.put(noisy)))
        if watch:
            watch(steps - k + 1, denoised)
        if k == 1 or (confidence is not None and bool((known.open(denoised).abs() >= confidence).all())):
            break
        noisy = torch.lerp(noisy, denoised, 1 / k)  # 1 - t'/t = 1/k
    return Sampled(sign(denoised), steps - k + 1, denoised)


def sde_sample(
    denoisers: Denoisers,
    start: Tensor,
    steps: int,
    noise: Callable[[int], Tensor],
    *,
    known: Known,
    watch: Watcher | None = None,
) -> Sampled:
    """Euler-Maruyama on the reverse SDE from t = 1 to 0.05, then one exact step to A0_hat.

    The forward process has drift -A/(1-t) and squared diffusion 2t/(1-t); the score is -(A - (1-t)·A0_hat)/t^2. Near t = 1 the
    drift is singular, so the first step is the ODE's.

    Args:
        noise: step number -> standard normal [N, M, K].
        steps: at least 2; the other arguments are those of :func:`ode_sample`.
    """
    times = torch.linspace(1.0, SDE_END, steps).tolist()
    noisy = start
    steps_down = zip(times, [*times[1:], 0.0], denoisers(known.times(times)), strict=True)
    for number, (t, following, denoise) in enumerate(steps_down):
        denoised = known.put(denoise(known.put(noisy)))
        if watch:
            watch(number + 1, denoised)
        if number == 0 or following == 0.0:
            noisy = following / t * noisy + (1 - following / t) * denoised
            continue
        diffusion = 2 * t / (1 - t)
        drift = -noisy / (1 - t) + diffusion * (noisy - (1 - t) * denoised) / t**2
        noisy = noisy - drift * (t - following) + (diffusion * (t - following)) ** 0.5 * noise(number)
    return Sampled(sign(denoised), steps, denoised)


def sequential_sample(
    draw: Callable[[int, Tensor], Tensor],
    start: Tensor,
    *,
    settle: Callable[[Tensor], Tensor] = sign,
    known: Known,
    watch: Watcher | None = None,
) -> Sampled:
    """Left to right inside the block: M head passes, no ODE (method, section 9).

    Args:
        draw: (i, bits [N, M, K] whose tokens before i are clean and whose others are ``start``) -> bits of token i [N, K].
        start: bits [N, M, K] before anything is drawn.
        settle: makes a drawn token valid before the next one sees it: bits [N, K] -> bits [N, K].
        known, watch: as in :func:`ode_sample`.
    """
    tokens = start.shape[-2]
    first = known.count()  # the prompt's tokens open the block
    bits = known.put(start)
    place = torch.arange(tokens, device=start.device)
    for i in range(first, tokens):
        drawn = settle(draw(i, bits))
        bits = torch.where((place == i).unsqueeze(-1), drawn.unsqueeze(1), bits)
        if watch:
            watch(i - first + 1, bits.masked_fill((place > i).unsqueeze(-1), 0.0))
    return Sampled(sign(bits), tokens - first, bits)
