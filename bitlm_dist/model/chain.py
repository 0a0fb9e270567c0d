"""Token after token inside a block, as `sequential` samples: the head's chain with its keys and values kept, or the denoiser.

Legend: N blocks, M tokens a block, K bits, D width of the backbone.
"""

from functools import partial

import torch
from torch import Tensor

from bitlm_dist.diffusion.outputs import MixtureOutput
from bitlm_dist.model.head import Context, DiffusionHead, finish


class ChainDecoder:
    """:meth:`DiffusionHead.chain` token by token.

    The modulation is computed once for the block, and every pass handles one token: keys and values of those before it are kept.
    """

    def __init__(self, head: DiffusionHead, context: Context) -> None:
        self._head, self._context = head, context
        self._modulation = head.modulate(context.condition.new_ones(1, 1), context)
        self._before: list[list[Tensor]] = [[] for _ in head.blocks]
        self._done = 0

    def sample(self, i: int, bits: Tensor, u: Tensor, temperature: float) -> Tensor:
        """Bits [N, K] of token i from uniform numbers u [N, K + 1]; the tokens before it are clean in ``bits`` [N, M, K].

        ``temperature`` divides the logits. i only grows.
        """
        head, raw, x = self._head, *self(i, bits)
        if head.tables is None:
            return head.output.sample(raw, u, temperature)
        assert isinstance(head.output, MixtureOutput)
        state = head.corrected(x, self._context.states[:, i])
        return head.output.sample(raw, u, temperature, partial(head.tables.after, state))

    def __call__(self, i: int, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Handle the tokens up to i -> raw output [N, size] before any table, last features [N, W]."""
        while self._done <= i:
            x = self._features(self._done, bits)
            self._done += 1
        logits = None if self._context.logits is None else self._context.logits[:, i]
        return finish(x[:, 0], logits, self._context.readout), x[:, 0]

    def _features(self, i: int, bits: Tensor) -> Tensor:
        head, here = self._head, slice(i, i + 1)
        modulation = self._modulation[:, here]
        x = torch.zeros_like(modulation.y) if i == 0 or head.before_in is None else head.before_in(bits[:, i - 1 : i])
        return head.features(x, modulation, True, here, self._before)


class NoiseDecoder:
    """The denoiser with the tokens before clean, and the token itself and those after it pure noise: per-token noise teaches it."""

    def __init__(self, head: DiffusionHead, context: Context) -> None:
        self._head, self._context = head, context

    def sample(self, i: int, bits: Tensor, u: Tensor, temperature: float) -> Tensor:
        """See :meth:`ChainDecoder.sample`; tokens from i on hold noise in ``bits``."""
        return self._head.output.sample(self(i, bits), u, temperature)

    def __call__(self, i: int, bits: Tensor) -> Tensor:
        """Raw output of token i [N, size]."""
        t = (torch.arange(bits.shape[-2], device=bits.device) >= i).float().expand(bits.shape[:-1])
        raw: Tensor = self._head(bits, t, self._context)[:, i]
        return raw
