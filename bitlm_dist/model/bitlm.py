"""BitLM: bits in, block-causal backbone, one-block shift, diffusion head (paper, section 3).

Legend: B batch, S sequence, K bits, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import Source
from bitlm_dist.diffusion.process import NoiseLaw, add_noise, training_draws
from bitlm_dist.model.bit_embedding import BitEmbedding, token_table
from bitlm_dist.model.head import DiffusionHead
from bitlm_dist.model.initialization import drawn_from
from bitlm_dist.model.language_model import Batch, LanguageModel, Place, target_mask


class BitLM(LanguageModel):
    """See :class:`~bitlm_dist.model.language_model.LanguageModel`.

    Args:
        config: checked.
        codes: assignment of codes to tokens; its B wins over ``model.bits``.
        eos: id that ends a document.
        place: which part of the model this is; None: all of it.
    """

    def __init__(self, config: Config, codes: BitCodes, eos: int, place: Place | None = None) -> None:
        super().__init__(config, eos, place)
        self.codes = codes
        width, seed = config.model.backbone.width, config.training.seed
        if self.place.stage.embeds:
            with drawn_from(seed, "embedding"):
                table = config.model.input == "table"
                window = config.model.input_window
                self.embedding = token_table(codes.vocabulary, width) if table else BitEmbedding(codes.bits, width, window)
        if self.place.stage.predicts:
            with drawn_from(seed, "head"):
                self.head = DiffusionHead(config, codes.bits)
        diffusion = config.diffusion
        self.noise_law = NoiseLaw(
            diffusion.time, diffusion.draws, diffusion.per_token, diffusion.per_token_sigma, diffusion.context_dropout
        )

    def embed(self, tokens: Tensor, flips: Tensor | None) -> Tensor:
        """See :class:`~bitlm_dist.model.language_model.LanguageModel`."""
        if self.config.model.input == "table":
            embedded: Tensor = self.embedding(tokens)
            return embedded
        bits = self.codes.encode(tokens)
        embedded = self.embedding(bits if flips is None else bits * flips)
        return embedded

    def parts(self) -> dict[str, nn.Module]:
        """See :class:`~bitlm_dist.model.language_model.LanguageModel`."""
        return {"backbone": self.backbone, "head": self.head, "input": self.embedding}

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """See :class:`~bitlm_dist.model.language_model.LanguageModel`."""
        with super().decoding(), self.head.decoding():
            yield

    def loss_of(self, states: Tensor, positions: Tensor, batch: Batch, *, seed: int, step: int) -> Tensor:
        """See :class:`~bitlm_dist.model.language_model.LanguageModel`; of a token, a mean over draws and bits."""
        targets = self.targets(batch, states, positions)
        answers = self._answers(targets.tokens, targets.drawn)
        clean, output = answers[0], self.head.output
        source = Source(seed, targets.sample, targets.block, step)
        draws = list(training_draws(self.noise_law, (self.block_size, self.codes.bits), source))
        # The context is dropped per block, not per draw: the backbone's states are read once.
        context = self.head.read(targets.context, draws[0].keep)
        t = torch.stack([draw.t for draw in draws])
        noisy = add_noise(clean, torch.stack([draw.eps for draw in draws]), t)
        raw = self.head(noisy, t, context.broadcast(len(draws)))
        loss = output.loss(raw, noisy, t, clean.expand(noisy.shape)).mean(0)
        if context.logits is not None:
            loss = loss + self._cross_entropy(context.logits, answers)
        if self.head.chained:
            loss = loss + self.config.diffusion.chain * self._cross_entropy(self.head.chain(clean, context, answers), answers)
        loss = (loss * targets.valid).sum()
        return loss + self._next_token_loss(batch, states, positions)

    def _next_token_loss(self, batch: Batch, states: Tensor, positions: Tensor) -> Tensor | float:
        """The context's cross-entropy at every state, in nats a bit: only states before a block's start have it otherwise.

        With causal attention every state could be the last of a block, so the backbone learns from every token, not every m-th.
        """
        weight = self.config.diffusion.next_token
        if weight == 0 or self.block_size == 1:  # the context logits of one-token blocks are this loss
            return 0.0
        following = F.pad(target_mask(batch, self.block_size, self.eos)[:, 1:], (0, 1))  # whether the next token carries loss
        row, place = following[:, positions].nonzero(as_tuple=True)
        after = positions[place] + 1
        answers = self._answers(batch.tokens[row, after], None if batch.drawn is None else batch.drawn[:, row, after])
        return weight * self._cross_entropy(self.head.next_logits(states[row, place]), answers).sum()

    def _answers(self, tokens: Tensor, drawn: Tensor | None) -> Tensor:
        """The text's tokens [...] and R of a teacher [R, ...] -> their bits [1 + R, ..., K]."""
        tokens = tokens.unsqueeze(0)
        return self.codes.encode(tokens if drawn is None else torch.cat((tokens, drawn)))

    def _cross_entropy(self, raw: Tensor, answers: Tensor) -> Tensor:
        """-log-probability of :meth:`_answers` at pure noise, in nats a bit, [...]; a teacher's share is that of the config."""
        log_prob = self.head.output.log_prob(raw.expand(*answers.shape[:-1], -1), answers)
        text, taught = log_prob[0], log_prob[1:]
        mixed = torch.lerp(text, taught.mean(0), self.config.distillation.weight) if len(taught) else text
        return -mixed / self.codes.bits

    def flips(self, batch: Batch, *, seed: int, step: int) -> Tensor | None:
        """Input bits flipped with probability p·U, one U a sequence (BitDance), or None where the switch is off."""
        most = self.config.diffusion.input_bit_flips
        if most == 0:
            return None
        # block 0 names the sequence's own U, block 1 + i the flips of token i
        sequences, places = batch.sample.unsqueeze(1), torch.arange(1 + batch.tokens.shape[1], device=batch.tokens.device)
        u = Source(seed, sequences, places.unsqueeze(0), step).uniforms(noise.BIT_FLIPS, self.codes.bits)
        return torch.where(u[:, 1:] < most * u[:, :1, :1], -1.0, 1.0)
