"""BitLM: bits in, block-causal backbone, one-block shift, diffusion head (paper, section 3).

Legend: B batch, S sequence, K bits, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import Source
from bitlm_dist.model.bit_embedding import BitEmbedding, token_table
from bitlm_dist.model.head import DiffusionHead
from bitlm_dist.model.head_loss import HeadLoss, every_state
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
            # a bound method, so that the head's parameters have one name; what shards the head puts its own here
            self.head_loss: Callable[..., Tensor] = HeadLoss(config, codes, self.head).__call__

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
        tokens, drawn = targets.tokens.unsqueeze(0), targets.drawn
        # With causal attention every state could be the last of a block, so the backbone learns from every token, not every m-th.
        carries = F.pad(target_mask(batch, self.block_size, self.eos)[:, 1:], (0, 1))[:, positions]
        if not every_state(self.config):
            carries = torch.zeros_like(carries)
        row, place = carries.nonzero(as_tuple=True)
        after = positions[place] + 1
        following = batch.tokens[row, after].unsqueeze(0)
        if drawn is not None and batch.drawn is not None:
            tokens, following = torch.cat((tokens, drawn)), torch.cat((following, batch.drawn[:, row, after]))
        return self.head_loss(
            targets.context, states[row, place], tokens, targets.valid, following, targets.sample, targets.block, seed, step
        )

    def flips(self, batch: Batch, *, seed: int, step: int) -> Tensor | None:
        """Input bits flipped with probability p·U, one U a sequence (BitDance), or None where the switch is off."""
        most = self.config.diffusion.input_bit_flips
        if most == 0:
            return None
        # block 0 names the sequence's own U, block 1 + i the flips of token i
        sequences, places = batch.sample.unsqueeze(1), torch.arange(1 + batch.tokens.shape[1], device=batch.tokens.device)
        u = Source(seed, sequences, places.unsqueeze(0), step).uniforms(noise.BIT_FLIPS, self.codes.bits)
        return torch.where(u[:, 1:] < most * u[:, :1, :1], -1.0, 1.0)
