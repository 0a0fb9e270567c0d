"""The head of the preset ``default``: the paper's, with the items of docs/recipe.md.

Legend: N blocks (any leading shape), M tokens per block, K bits, D hidden size of the backbone,
W hidden size of the head, A alternative tokens per position.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from bitlm_dist.config import Config
from bitlm_dist.diffusion.outputs import MixtureOutput
from bitlm_dist.kernels.skinny_linear import linear
from bitlm_dist.model.bit_embedding import BitEmbedding
from bitlm_dist.model.conditional_group_logits import ConditionalGroupLogits
from bitlm_dist.model.heads.base import Conditioning
from bitlm_dist.model.heads.blocks import AdaLNHead, Modulation
from bitlm_dist.model.heads.config import PaperHeadConfig
from bitlm_dist.model.initialization import Linear, normal, random_parameter, zero_linear

Readout = tuple[Tensor, Tensor]  # weight [num_logits, W] and bias [num_logits]


@dataclass(frozen=True)
class BitLMConditioning(Conditioning):
    """The conditioning, and what the output starts from."""

    context_logits: Tensor  # [N, M, num_logits] for the output distribution
    readout: Readout  # maps the last features to a correction of the context logits


class Lookahead(nn.Module):
    """Adds to the state of each position a projection of the block's last state.

    With causal attention, only the last state has seen the full block. Each position has a D x D
    projection of its own, which starts at zero.
    """

    def __init__(self, block_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(block_size, hidden_size, hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Look ahead from the states [N, M, D] of whole blocks."""
        projected = linear(hidden[..., -1, :], self.weight.flatten(0, 1))
        return hidden + projected.unflatten(-1, self.weight.shape[:2])

    def first(self, states: Tensor) -> Tensor:
        """Look ahead from states [..., D], each the last of its block, to the token after it."""
        return states + linear(states, self.weight[0])


class BitLMHead(AdaLNHead[BitLMConditioning]):
    """Corrects the context logits by what noisy bits, or the earlier tokens of the block, tell.

    An untrained head returns the context logits alone. The comments name the items of the recipe.
    """

    output: MixtureOutput
    lookahead: Lookahead

    def __init__(self, config: Config, num_bits: int) -> None:
        super().__init__(config, num_bits)
        self.build_readout(config)
        self._readout: Readout | None = None  # set while decoding

    @override
    def build_inputs(self, config: Config, num_bits: int) -> None:
        head = config.head
        assert not isinstance(head, PaperHeadConfig)
        width = head.hidden_size
        state_size = config.model.backbone.hidden_size
        self.block_size = config.model.block_size
        super().build_inputs(config, num_bits)

        # Mixture of products over groups of bits.
        self.output = MixtureOutput(num_bits, head.bits_per_group, head.num_mixture_components)

        # Position table and lookahead. In a block of one token there is nothing to look ahead at.
        self.positions = nn.Parameter(torch.zeros(self.block_size, state_size))
        if self.block_size > 1:
            self.lookahead = Lookahead(self.block_size, state_size)

        # Conditioning and position as an input, not only as modulation.
        self.position_bias = random_parameter(self.block_size, width, distribution=normal(0.1))

        # Context logits, and the posterior given these and the noisy bits as an input.
        self.context_out = Linear(state_size, self.output.num_logits)
        self.posterior_in = Linear(self.output.num_posterior_features, width, bias=False)

        # The autoregressive pass reads the token before.
        if self.block_size > 1:
            self.previous_token_in = BitEmbedding(num_bits, width, config.model.input_window)

    def build_readout(self, config: Config) -> None:
        """Build the map from the last features to the raw output."""
        state_size = config.model.backbone.hidden_size

        # Shared readout: the head corrects the state, and the context logits' map reads both. So it
        # does not have to learn a second time what that map learns about the output distribution.
        self.final = zero_linear(Linear(config.head.hidden_size, state_size))

        # Group tables.
        self.conditional_group_logits = ConditionalGroupLogits(self.output, state_size)

    @property
    @override
    def loss_terms(self) -> tuple[str, ...]:
        if self.block_size > 1:
            return ("denoising", "context", "autoregressive", "next_token")
        # Here the context logits are those of the next token, and only the group tables have
        # anything to condition on.
        has_tables = self.output.num_groups > 1
        return ("denoising", "context", "autoregressive")[: 3 if has_tables else 2]

    # --- conditioning -----------------------------------------------------------------------------

    @override
    def condition(self, hidden: Tensor, keep_mask: Tensor | None = None) -> BitLMConditioning:
        hidden = self.look_ahead(self.keep_or_null(hidden, keep_mask))
        readout = self.make_readout() if self._readout is None else self._readout
        return BitLMConditioning(hidden, self.context_in(hidden), self.context_out(hidden), readout)

    def look_ahead(self, hidden: Tensor) -> Tensor:
        """The states [N, M, D] that condition the tokens at their positions."""
        if self.block_size > 1:
            hidden = self.lookahead(hidden)
        return hidden + self.positions

    def next_token_logits(self, states: Tensor) -> Tensor:
        """Context logits [..., num_logits] of the token after each state [..., D].

        That token is position 0 of a hypothetical block which begins there.
        """
        logits: Tensor = self.context_out(self.lookahead.first(states) + self.positions[0])
        return logits

    def make_readout(self) -> Readout:
        """Weight and bias that map the last features to the correction of the context logits.

        The raw output is context_out(state + final(x)), which is linear, and context_out(state) are
        the context logits. What is left is one small matrix, the product of context_out and final,
        so no token needs an intermediate vector of size D.
        """
        weight = self.context_out.weight @ self.final.weight
        return weight, F.linear(self.final.bias, self.context_out.weight)

    @override
    @contextmanager
    def decoding(self) -> Iterator[None]:
        self._readout = self.make_readout()

        try:
            yield
        finally:
            self._readout = None

    # --- passes -----------------------------------------------------------------------------------

    @override
    def features(
        self,
        x: Tensor,
        modulation: Modulation,
        causal: bool = False,
        positions: slice = slice(None),
        qkv_caches: list[list[Tensor]] | None = None,
    ) -> Tensor:
        x = x + self.input_condition(modulation, positions)
        return super().features(x, modulation, causal, positions, qkv_caches)

    def input_condition(self, modulation: Modulation, positions: slice) -> Tensor:
        """What is added to the input of tokens at ``positions``, [N, M, W]."""
        return modulation.adaln_input + self.position_bias[positions]

    @override
    def denoise(self, noisy: Tensor, t: Tensor, conditioning: BitLMConditioning) -> Tensor:
        posterior = self.output.posterior_features(
            conditioning.context_logits, self.output.channel_logits(noisy, t)
        )
        return self._denoise(noisy, posterior, self.modulate(t, conditioning), conditioning)

    def _denoise(
        self,
        noisy: Tensor,
        posterior: Tensor,
        modulation: Modulation,
        conditioning: BitLMConditioning,
    ) -> Tensor:
        x = self.features(self.embed_noisy(noisy, posterior), modulation)
        return self.read_out(x, conditioning.context_logits, conditioning)

    def embed_noisy(self, noisy: Tensor, posterior: Tensor) -> Tensor:
        """Inputs [N, M, W] of the denoiser, from noisy bits and their posterior."""
        return self.bits_in(noisy) + self.posterior_in(posterior)

    def read_out(
        self, x: Tensor, context_logits: Tensor, conditioning: BitLMConditioning
    ) -> Tensor:
        """Map last features [..., W] to the raw output, from context logits [..., num_logits]."""
        return linear(x, *conditioning.readout) + context_logits

    @override
    def estimator(
        self, conditioning: BitLMConditioning
    ) -> Callable[[Tensor, Modulation, Tensor], Tensor]:
        posterior_fn = self.output.posterior_fn(conditioning.context_logits)

        def estimate(t: Tensor, modulation: Modulation, noisy: Tensor) -> Tensor:
            """Estimate the clean bits at one noise level."""
            channel_logits = self.output.channel_logits(noisy, t)
            logits = self._denoise(noisy, posterior_fn(channel_logits), modulation, conditioning)
            return self.output.denoise(logits, channel_logits)

        return estimate

    def autoregress(
        self, clean: Tensor, conditioning: BitLMConditioning, targets: Tensor | None = None
    ) -> Tensor:
        """Raw output of each token given the context and the tokens before it in its block.

        The inputs hold no noisy bits and attention is causal, so no position sees its own token or
        a later one. Within a token, only the group tables condition a group of bits on the previous
        one. This models the same distribution as M left-to-right denoiser passes, in a single pass:
        the log-probability of ``clean`` under the output is that of the chain rule.

        Args:
            clean: bits [N, M, K].
            targets: bits [A, N, M, K] of alternative tokens at the same positions. The group tables
                give each of them its own raw output. None: ``clean``.

        Returns:
            [N, M, num_logits], or [A, N, M, num_logits] for ``targets``.
        """
        t = clean.new_ones(1, 1)  # pure noise at all tokens, so its embedding is computed once
        x = self.features(
            self.embed_previous(clean, conditioning), self.modulate(t, conditioning), causal=True
        )
        logits = self.read_out(x, conditioning.context_logits, conditioning)

        targets = clean if targets is None else targets
        return self.logits_given_groups(
            logits.expand(*targets.shape[:-1], -1), x, conditioning.hidden_states, targets
        )

    def embed_previous(self, clean: Tensor, conditioning: BitLMConditioning) -> Tensor:
        """Inputs [N, M, W] of the autoregressive pass: each token's previous one, or zeros."""
        if self.block_size == 1:
            return torch.zeros_like(conditioning.projected)
        return F.pad(self.previous_token_in(clean[..., :-1, :]), (0, 0, 1, 0))

    def logits_given_groups(
        self, logits: Tensor, x: Tensor, hidden_states: Tensor, targets: Tensor
    ) -> Tensor:
        """Correct the raw output of tokens by their own groups: each given the one before it.

        Args:
            logits: [A, N, M, num_logits].
            x: last features [N, M, W].
            hidden_states: those of the conditioning, [N, M, D].
            targets: bits [A, N, M, K] of the tokens.
        """
        return self.conditional_group_logits(logits, hidden_states + self.final(x), targets)

    def sample_token(
        self, logits: Tensor, x: Tensor, hidden_states: Tensor, u: Tensor, temperature: float
    ) -> Tensor:
        """Sample bits [N, K] of a token of the autoregressive pass, its groups in order.

        Args:
            logits: raw output [N, num_logits] before any group table.
            x: last features [N, W].
            hidden_states: those of the conditioning, [N, D].
            u: uniform random numbers [N, K + 1].
            temperature: divides the logits.
        """
        readout_input = hidden_states + self.final(x)
        return self.output.sample(
            logits,
            u,
            temperature,
            partial(self.conditional_group_logits.logits_given_previous, readout_input),
        )
