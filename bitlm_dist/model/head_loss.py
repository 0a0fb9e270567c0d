"""All that training asks of the head for a microbatch, as one module: what shards the head wraps this, and its forward alone.

Legend: N target blocks, M tokens a block, K bits, D width, R tokens drawn by a teacher, T states inside documents.
"""

import torch
from torch import Tensor, nn

from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.diffusion.noise import Source
from bitlm_dist.diffusion.process import NoiseLaw, noised
from bitlm_dist.model.head import DiffusionHead


def every_state(config: Config) -> bool:
    """Whether the token after every state carries loss; the context logits of one-token blocks are that loss already."""
    return config.diffusion.next_token > 0 and config.model.block_size > 1


class HeadLoss(nn.Module):
    """The objective of the head's blocks (paper, section 3.3, with the terms of the recipe).

    Args:
        config: checked.
        codes: of the vocabulary.
        head: its parameters are this module's.
    """

    def __init__(self, config: Config, codes: BitCodes, head: DiffusionHead) -> None:
        super().__init__()
        self.head, self.codes = head, codes
        diffusion = config.diffusion
        self.noise_law = NoiseLaw(
            diffusion.time, diffusion.draws, diffusion.per_token, diffusion.per_token_sigma, diffusion.context_dropout
        )
        self.chain, self.next_token, self.taught = diffusion.chain, diffusion.next_token, config.distillation.weight
        self.every_state = every_state(config)

    def forward(
        self,
        context: Tensor,
        states: Tensor,
        tokens: Tensor,
        valid: Tensor,
        following: Tensor,
        sample: Tensor,
        block: Tensor,
        seed: int,
        step: int,
    ) -> Tensor:
        """Sum over valid tokens of the loss in nats a bit, a mean over draws.

        Args:
            context: [N, M, D] states of the block before each target.
            states: [T, D] states whose next token carries loss of its own; T = 0 unless ``every_state``.
            tokens: [1 + R, N, M] of the text, then those drawn by a teacher.
            valid: [N, M] bool.
            following: [1 + R, T] the token after each of ``states``.
            sample, block: int64 [N], where a target is: names its noise.
            seed, step: of the run.
        """
        clean = self.codes.encode(tokens)
        loss = self._denoising(context, clean, Source(seed, sample, block, step))
        loss = (loss * valid).sum()
        if self.every_state:
            logits = self.head.next_logits(states)
            loss = loss + self.next_token * self._cross_entropy(logits, self.codes.encode(following)).sum()
        return loss

    def _denoising(self, context: Tensor, clean: Tensor, source: Source) -> Tensor:
        """Loss of each token [N, M]; clean [1 + R, N, M, K]."""
        head = self.head
        noisy, t, keep = noised(self.noise_law, clean[0], source)
        read = head.read(context, keep)
        raw = head(noisy, t, read.broadcast(len(noisy)))
        loss = head.output.loss(raw, noisy, t, clean[0].expand(noisy.shape)).mean(0)
        if read.logits is not None:
            loss = loss + self._cross_entropy(read.logits, clean)
        if head.chained:
            loss = loss + self.chain * self._cross_entropy(head.chain(clean[0], read, clean), clean)
        return loss

    def _cross_entropy(self, raw: Tensor, answers: Tensor) -> Tensor:
        """-log-probability of answers [1 + R, ..., K] at pure noise, in nats a bit, [...]; a teacher has its share of it."""
        log_prob = self.head.output.log_prob(raw.expand(*answers.shape[:-1], -1), answers)
        text, taught = log_prob[0], log_prob[1:]
        mixed = torch.lerp(text, taught.mean(0), self.taught) if len(taught) else text
        return -mixed / self.codes.bits
