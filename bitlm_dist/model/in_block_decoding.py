"""Left-to-right decoding inside a block, for the ``sequential`` sampler.

One decoder runs the head's autoregressive pass with a key-value cache, the other the denoiser.

Legend: N blocks, M tokens per block, K bits, D hidden size of the backbone, W of the head.
"""

from typing import Any

import torch
from torch import Tensor

from bitlm_dist.model.heads.base import Conditioning, Head
from bitlm_dist.model.heads.bitlm import BitLMConditioning, BitLMHead


class AutoregressiveDecoder:
    """:meth:`BitLMHead.autoregress`, one token at a time.

    The modulation is computed once per block. Every pass handles a single token: the keys and
    values of the tokens before it are cached.
    """

    def __init__(self, head: BitLMHead, conditioning: BitLMConditioning) -> None:
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
        logits, x = self(i, bits)
        return self._head.sample_token(
            logits, x, self._conditioning.hidden_states[:, i], u, temperature
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

        context_logits = self._conditioning.context_logits[:, i]
        return self._head.read_out(x[:, 0], context_logits, self._conditioning), x[:, 0]

    def _features(self, i: int, bits: Tensor) -> Tensor:
        """Run the layers on token i, extending the caches: [N, 1, W]."""
        head = self._head
        position = slice(i, i + 1)
        modulation = self._modulation[:, position]

        # The input is the token before; the first token has none.
        x = (
            torch.zeros_like(modulation.adaln_input)
            if i == 0
            else head.previous_token_in(bits[:, i - 1 : i])
        )
        return head.features(x, modulation, True, position, self._qkv_caches)


class DenoisingDecoder:
    """The denoiser, one token at a time: earlier tokens are clean, the others pure noise.

    Training with per-token noise covers these inputs.
    """

    def __init__(self, head: Head[Any], conditioning: Conditioning) -> None:
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
        return self._head.denoise(bits, t, self._conditioning)[:, i]
