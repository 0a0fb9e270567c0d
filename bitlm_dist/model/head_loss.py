"""The head's training objective for one microbatch.

ZeRO and FSDP2 wrap this module; ``forward`` is the only entry point they see.

Legend: N target blocks, M tokens per block, K bits, D hidden size of the backbone, R samples of a
teacher per token, T states within documents.
"""

import torch
from torch import Tensor, nn

from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.diffusion.noise import NoiseKey
from bitlm_dist.diffusion.process import NoiseDistribution, sample_noisy
from bitlm_dist.model.head import DiffusionHead


def has_next_token_loss(config: Config) -> bool:
    """True if the token after every state carries loss.

    For one-token blocks, the loss of the context logits is already that loss.
    """
    return config.diffusion.next_token_loss_weight > 0 and config.model.block_size > 1


class HeadLoss(nn.Module):
    """Objective of the head's blocks (paper, section 3.3, with the terms of the recipe).

    Args:
        config: a validated config.
        codes: codes of the vocabulary.
        head: becomes a submodule; its parameters are this module's only parameters.
    """

    def __init__(self, config: Config, codes: BitCodes, head: DiffusionHead) -> None:
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
        self.autoregressive_loss_weight = diffusion.autoregressive_loss_weight
        self.next_token_loss_weight = diffusion.next_token_loss_weight
        self.distillation_weight = config.distillation.weight
        self.has_next_token_loss = has_next_token_loss(config)

    def forward(
        self,
        context_hidden: Tensor,
        hidden_states: Tensor,
        tokens: Tensor,
        valid: Tensor,
        next_tokens: Tensor,
        sequence_index: Tensor,
        block_index: Tensor,
        seed: int,
        step: int,
    ) -> Tensor:
        """Sum the loss over the valid tokens, in nats per bit, as a mean over noise samples.

        Args:
            context_hidden: [N, M, D] states of the block before each target.
            hidden_states: [T, D] states whose next token carries a loss of its own; T = 0 unless
                ``has_next_token_loss``.
            tokens: [1 + R, N, M], the text first, then the samples of a teacher.
            valid: [N, M] bool.
            next_tokens: [1 + R, T] the token after each of ``hidden_states``.
            sequence_index, block_index: int64 [N], location of each target, which keys its noise.
            seed, step: seed of the run and the training step, which key the noise too.
        """
        clean = self.codes.ids_to_bits(tokens)
        loss = self._denoising_loss(
            context_hidden, clean, NoiseKey(seed, sequence_index, block_index, step)
        )
        loss = (loss * valid).sum()

        if self.has_next_token_loss:
            logits = self.head.next_token_logits(hidden_states)
            loss = (
                loss
                + self.next_token_loss_weight
                * self._cross_entropy(logits, self.codes.ids_to_bits(next_tokens)).sum()
            )

        return loss

    def _denoising_loss(self, context_hidden: Tensor, clean: Tensor, noise_key: NoiseKey) -> Tensor:
        """Loss of each token [N, M] with bits ``clean`` [1 + R, N, M, K]."""
        head = self.head
        noisy, t, keep_mask = sample_noisy(self.noise_distribution, clean[0], noise_key)
        conditioning = head.condition(context_hidden, keep_mask)

        # All noise samples share one conditioning.
        logits = head(noisy, t, conditioning.expand(len(noisy)))
        loss = head.output.loss(logits, noisy, t, clean[0].expand(noisy.shape)).mean(0)

        # The context logits must predict the block on their own, without any noisy bits.
        if conditioning.context_logits is not None:
            loss = loss + self._cross_entropy(conditioning.context_logits, clean)

        if head.has_autoregressive_pass:
            loss = loss + self.autoregressive_loss_weight * self._cross_entropy(
                head.autoregressive_logits(clean[0], conditioning, clean), clean
            )
        return loss

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
