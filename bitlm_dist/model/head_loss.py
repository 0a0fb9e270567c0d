"""The head's training objective for one microbatch.

ZeRO and FSDP2 wrap this module; ``forward`` is the only entry point they see.

Legend: N target blocks, M tokens per block, K bits, D hidden size of the backbone, R samples of a
teacher per token, T states whose next token carries loss, A noise samples.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.diffusion.noise import NoiseKey
from bitlm_dist.diffusion.process import NoiseDistribution, sample_noisy
from bitlm_dist.model.heads.base import Conditioning, Head
from bitlm_dist.model.heads.bitlm import BitLMHead
from bitlm_dist.model.loss_terms import (
    NUM_NOISE_LEVELS,
    noise_level_bin,
    pack_terms,
    sum_by_bin,
    sum_by_position,
)


class HeadBatch(NamedTuple):
    """All that the head is given of one microbatch."""

    context: Tensor  # [N, M, D] states of the block before each target
    states: Tensor  # [T, D] states whose next token carries a loss of its own
    tokens: Tensor  # [1 + R, N, M] the targets: the text, then the samples of a teacher
    valid: Tensor  # [N, M] bool, the tokens that carry loss
    next_tokens: Tensor  # [1 + R, T] the token after each of the states
    next_valid: Tensor  # [T] bool
    next_position: Tensor  # [T] int64, position of that token in its block
    sequence_index: Tensor  # [N] int64, with block_index the key of a target's noise
    block_index: Tensor  # [N] int64
    seed: int  # of the run
    step: int  # of training; both key the noise, too


class HeadLoss(nn.Module):
    """Objective of the head's blocks (paper, section 3.3, with the terms of the recipe).

    Args:
        config: a validated config.
        codes: codes of the vocabulary.
        head: becomes a submodule; its parameters are this module's only parameters.
    """

    def __init__(self, config: Config, codes: BitCodes, head: Head[Any]) -> None:
        super().__init__()
        self.head = head
        self.codes = codes

        diffusion = config.diffusion
        self.noise_distribution = NoiseDistribution(
            diffusion.time_distribution,
            diffusion.num_noise_samples,
            diffusion.per_token_noise_prob,
            diffusion.per_token_noise_sigma,
            diffusion.context_dropout,
        )
        self.distillation_weight = config.distillation.weight
        self.weights = diffusion.loss_weights(head.loss_terms)
        self.detached = frozenset(diffusion.detached_losses)

    def forward(self, batch: HeadBatch) -> tuple[Tensor, Tensor]:
        """Sum the loss over the valid tokens, in nats per bit, as a mean over noise samples.

        Returns:
            The loss [], and its terms, see :func:`pack_terms`, which carry no gradient.
        """
        clean = self.codes.ids_to_bits(batch.tokens)
        key = NoiseKey(batch.seed, batch.sequence_index, batch.block_index, batch.step)
        noisy, t, keep_mask = sample_noisy(self.noise_distribution, clean[0], key)

        # All noise samples and terms of blocks share one conditioning, but for terms kept from the
        # backbone.
        block_terms = self.weights.keys() - {"next_token"}
        conditioning = {
            is_detached: self.head.condition(
                _zero_gradient(batch.context) if is_detached else batch.context, keep_mask
            )
            for is_detached in {term in self.detached for term in block_terms}
        }
        denoising = self._denoising_loss(
            clean[0], noisy, t, conditioning["denoising" in self.detached]
        )
        losses = {
            "denoising": denoising.mean(0),
            **self._block_losses(clean, conditioning),
        }
        loss = torch.zeros((), device=denoising.device)
        for term, values in losses.items():
            loss = loss + self.weights[term] * (values * batch.valid).sum()
        sums = {term: sum_by_position(values, batch.valid) for term, values in losses.items()}

        if "next_token" in self.weights:
            values = self._next_token_loss(batch)
            loss = loss + self.weights["next_token"] * (values * batch.next_valid).sum()
            sums["next_token"] = sum_by_bin(
                values, batch.next_position, batch.next_valid, batch.valid.shape[1]
            )

        by_noise_level = sum_by_bin(denoising, noise_level_bin(t), batch.valid, NUM_NOISE_LEVELS)
        return loss, pack_terms(sums, by_noise_level)

    def _denoising_loss(
        self, clean: Tensor, noisy: Tensor, t: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Loss of each noise sample and token, [A, N, M]."""
        logits = self.head.denoise(noisy, t, conditioning.expand(len(noisy)))
        return self.head.output.loss(logits, noisy, t, clean.expand(noisy.shape))

    def _block_losses(self, clean: Tensor, conditioning: Mapping[bool, Any]) -> dict[str, Tensor]:
        """Losses [N, M] that see no noise, of bits [1 + R, N, M, K]."""
        losses: dict[str, Tensor] = {}
        head = self.head
        if not isinstance(head, BitLMHead):
            return losses

        # The context logits must predict the block on their own.
        if "context" in self.weights:
            given = conditioning["context" in self.detached]
            losses["context"] = self._cross_entropy(given.context_logits, clean)
        if "autoregressive" in self.weights:
            given = conditioning["autoregressive" in self.detached]
            losses["autoregressive"] = self._cross_entropy(
                head.autoregress(clean[0], given, clean), clean
            )
        return losses

    def _next_token_loss(self, batch: HeadBatch) -> Tensor:
        """Loss [T] of the token after each state."""
        assert isinstance(self.head, BitLMHead)
        states = _zero_gradient(batch.states) if "next_token" in self.detached else batch.states
        return self._cross_entropy(
            self.head.next_token_logits(states), self.codes.ids_to_bits(batch.next_tokens)
        )

    def _cross_entropy(self, logits: Tensor, target_bits: Tensor) -> Tensor:
        """Negative log-probability at pure noise, in nats per bit.

        The samples of a teacher, if any, enter with the weight ``distillation_weight``.

        Args:
            logits: broadcast to [1 + R, ..., num_logits].
            target_bits: [1 + R, ..., K].

        Returns:
            [...].
        """
        log_prob = self.head.output.log_prob(
            logits.expand(*target_bits.shape[:-1], -1), target_bits
        )
        text_log_prob = log_prob[0]
        teacher_log_prob = log_prob[1:]

        mixed_log_prob = (
            torch.lerp(text_log_prob, teacher_log_prob.mean(0), self.distillation_weight)
            if len(teacher_log_prob)
            else text_log_prob
        )
        return -mixed_log_prob / self.codes.num_bits


def _zero_gradient(x: Tensor) -> Tensor:
    zeroed: Tensor = _ZeroGradient.apply(x)
    return zeroed


class _ZeroGradient(torch.autograd.Function):
    """The identity, with a gradient of zeros.

    A detached tensor would have none, for which an earlier pipeline stage waits for ever, and
    Megatron's reduction of gradients, too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return x."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Drop the gradient."""
        return torch.zeros_like(grad)
