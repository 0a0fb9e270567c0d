"""Heads of the study: the default's without some of its items.

``head.kind: ablation`` with ``head.ablation: NAME`` selects one. Those from `no_group_tables` to
`bare` are the steps of the ladder, each without one more item than the one before; the others lack
a single one. ladder.yaml has the configs of all rows.

A head builds the default's parts and drops those that it lacks. Initial weights depend on the seed
and their names, so in the parts that both have they are the same, and the item alone differs.
"""

import torch
from torch import Tensor
from typing_extensions import override

from bitlm_dist.config import Config
from bitlm_dist.model.heads.bitlm import BitLMConditioning, BitLMHead, Readout
from bitlm_dist.model.heads.blocks import Modulation
from bitlm_dist.model.initialization import Linear, zero_linear


class NoGroupTables(BitLMHead):
    """The groups of a token depend on each other only through the mixture's components."""

    @override
    def build_readout(self, config: Config) -> None:
        super().build_readout(config)
        del self.conditional_group_logits

    @property
    @override
    def loss_terms(self) -> tuple[str, ...]:
        has_previous = self.block_size > 1
        return super().loss_terms if has_previous else ("denoising", "context")

    @override
    def logits_given_groups(
        self, logits: Tensor, x: Tensor, hidden_states: Tensor, targets: Tensor
    ) -> Tensor:
        return logits

    @override
    def sample_token(
        self, logits: Tensor, x: Tensor, hidden_states: Tensor, u: Tensor, temperature: float
    ) -> Tensor:
        return self.output.sample(logits, u, temperature)


class NoAutoregressivePass(NoGroupTables):
    """The denoiser alone: it goes through a block from left to right, if noise is per token."""

    @override
    def build_inputs(self, config: Config, num_bits: int) -> None:
        super().build_inputs(config, num_bits)
        if self.block_size > 1:
            del self.previous_token_in

    @property
    @override
    def loss_terms(self) -> tuple[str, ...]:
        return tuple(term for term in super().loss_terms if term != "autoregressive")


class OwnReadout(NoAutoregressivePass):
    """The head has an output layer of its own, not that of the context logits."""

    @override
    def build_readout(self, config: Config) -> None:
        self.final = zero_linear(Linear(config.head.hidden_size, self.output.num_logits))

    @override
    def make_readout(self) -> Readout:
        return self.final.weight, self.final.bias


class PlainConditioning(OwnReadout):
    """State i alone conditions token i, and only modulates it."""

    @override
    def build_inputs(self, config: Config, num_bits: int) -> None:
        super().build_inputs(config, num_bits)
        del self.positions, self.position_bias
        if self.block_size > 1:
            del self.lookahead

    @override
    def look_ahead(self, hidden: Tensor) -> Tensor:
        return hidden

    @override
    def next_token_logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.context_out(states)
        return logits

    @override
    def input_condition(self, modulation: Modulation, positions: slice) -> Tensor:
        return torch.zeros((), device=modulation.adaln_input.device)


class NoPosteriorInput(PlainConditioning):
    """The head's input is the noisy bits alone."""

    @override
    def build_inputs(self, config: Config, num_bits: int) -> None:
        super().build_inputs(config, num_bits)
        del self.posterior_in

    @override
    def embed_noisy(self, noisy: Tensor, posterior: Tensor) -> Tensor:
        embedded: Tensor = self.bits_in(noisy)
        return embedded


class Bare(NoPosteriorInput):
    """The paper's head on the mixture's logits: no context logits."""

    @override
    def build_inputs(self, config: Config, num_bits: int) -> None:
        super().build_inputs(config, num_bits)
        del self.context_out

    @property
    @override
    def loss_terms(self) -> tuple[str, ...]:
        return ("denoising",)

    @override
    def condition(self, hidden: Tensor, keep_mask: Tensor | None = None) -> BitLMConditioning:
        hidden = self.keep_or_null(hidden, keep_mask)
        no_logits = hidden.new_zeros(*hidden.shape[:-1], self.output.num_logits)
        return BitLMConditioning(hidden, self.context_in(hidden), no_logits, self.make_readout())


class NoLookahead(BitLMHead):
    """State i alone conditions token i."""

    @override
    def build_inputs(self, config: Config, num_bits: int) -> None:
        super().build_inputs(config, num_bits)
        if self.block_size > 1:
            del self.lookahead

    @override
    def look_ahead(self, hidden: Tensor) -> Tensor:
        return hidden + self.positions

    @override
    def next_token_logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.context_out(states + self.positions[0])
        return logits


class NoInputCondition(BitLMHead):
    """Time, conditioning and position modulate the layers, and are no input."""

    @override
    def build_inputs(self, config: Config, num_bits: int) -> None:
        super().build_inputs(config, num_bits)
        del self.position_bias

    @override
    def input_condition(self, modulation: Modulation, positions: slice) -> Tensor:
        return torch.zeros((), device=modulation.adaln_input.device)


HEADS: dict[str, type[BitLMHead]] = {
    "no_group_tables": NoGroupTables,
    "no_autoregressive_pass": NoAutoregressivePass,
    "own_readout": OwnReadout,
    "plain_conditioning": PlainConditioning,
    "no_posterior_input": NoPosteriorInput,
    "bare": Bare,
    "no_lookahead": NoLookahead,
    "no_input_condition": NoInputCondition,
}
