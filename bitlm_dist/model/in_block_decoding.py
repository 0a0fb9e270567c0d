"""Left-to-right decoding inside a block, for the ``sequential`` sampler.

One decoder runs the head's autoregressive pass with a key-value cache, the other the denoiser.

Legend: N blocks, M tokens per block, K bits, D hidden size of the backbone, W of the head.
"""

from functools import partial

import torch
from torch import Tensor

from bitlm_dist.diffusion.outputs import MixtureOutput
from bitlm_dist.model.head import Conditioning, DiffusionHead, apply_readout


class AutoregressiveDecoder:
    """:meth:`DiffusionHead.autoregressive_logits`, one token at a time.

    The modulation is computed once per block. Every pass handles a single token: the keys and
    values of the tokens before it are cached.
    """

    def __init__(self, head: DiffusionHead, conditioning: Conditioning) -> None:
        self._head = head
        self._conditioning = conditioning
        self._modulation = head.modulate(conditioning.projected.new_ones(1, 1), conditioning)
        self._qkv_caches: list[list[Tensor]] = [[] for _ in head.blocks]
        self._num_decoded = 0

    def sample_token(self, i: int, bits: Tensor, u: Tensor, temperature: float) -> Tensor:
        """Sample token i.

        Args:
            i: position in the block; must increase from call to call.
            bits: [N, M, K], clean at the positions before i.
            u: uniform random numbers [N, K + 1].
            temperature: divides the logits.

        Returns:
            Bits [N, K].
        """
        head = self._head
        logits, x = self(i, bits)
        if head.conditional_group_logits is None:
            return head.output.sample(logits, u, temperature)

        # With group tables, the groups are sampled in order, each given the one before.
        assert isinstance(head.output, MixtureOutput)
        readout_input = head.readout_input(x, self._conditioning.hidden_states[:, i])
        return head.output.sample(
            logits,
            u,
            temperature,
            partial(head.conditional_group_logits.logits_given_previous, readout_input),
        )

    def __call__(self, i: int, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Process the tokens up to position i.

        Returns:
            Raw output [N, num_logits] of token i before any group table, and its last features
            [N, W].
        """
        while self._num_decoded <= i:
            x = self._features(self._num_decoded, bits)
            self._num_decoded += 1

        context_logits = (
            None
            if self._conditioning.context_logits is None
            else self._conditioning.context_logits[:, i]
        )
        return apply_readout(x[:, 0], context_logits, self._conditioning.readout), x[:, 0]

    def _features(self, i: int, bits: Tensor) -> Tensor:
        """Run the layers on token i, extending the caches: [N, 1, W]."""
        head = self._head
        position = slice(i, i + 1)
        modulation = self._modulation[:, position]

        # The input is the token before; the first token has none.
        x = (
            torch.zeros_like(modulation.adaln_input)
            if i == 0 or head.previous_token_in is None
            else head.previous_token_in(bits[:, i - 1 : i])
        )
        return head.features(x, modulation, True, position, self._qkv_caches)


class DenoisingDecoder:
    """The denoiser, one token at a time: earlier tokens are clean, the others pure noise.

    Training with per-token noise covers these inputs.
    """

    def __init__(self, head: DiffusionHead, conditioning: Conditioning) -> None:
        self._head = head
        self._conditioning = conditioning

    def sample_token(self, i: int, bits: Tensor, u: Tensor, temperature: float) -> Tensor:
        """Sample token i, as :meth:`AutoregressiveDecoder.sample_token` does.

        ``bits`` must hold noise at position i and after it.
        """
        return self._head.output.sample(self(i, bits), u, temperature)

    def __call__(self, i: int, bits: Tensor) -> Tensor:
        """Raw output of token i, [N, num_logits]."""
        # t = 0 marks the clean tokens, t = 1 the noise
        t = (torch.arange(bits.shape[-2], device=bits.device) >= i).float().expand(bits.shape[:-1])
        logits: Tensor = self._head(bits, t, self._conditioning)[:, i]
        return logits
