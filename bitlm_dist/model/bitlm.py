"""BitLM: bits in, block-causal backbone, one-block shift, diffusion head (paper, section 3).

Legend: B batch, S sequence, N blocks a sequence, M tokens a block, K bits, D width, V valid target blocks of a batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import Source
from bitlm_dist.diffusion.process import NoiseLaw, add_noise, training_draws
from bitlm_dist.model.backbone import Backbone
from bitlm_dist.model.bit_embedding import BitEmbedding
from bitlm_dist.model.head import DiffusionHead, exact


@dataclass(frozen=True)
class Batch:
    """Packed sequences, see :mod:`bitlm_dist.data.packing`."""

    tokens: Tensor  # [B, S] int64
    document_ids: Tensor  # [B, S] int64, -1 where the sequence is padding
    sample: Tensor  # [B] int64, global index of each sequence

    def part(self, rows: slice) -> "Batch":
        """Some of the sequences: a microbatch."""
        return Batch(self.tokens[rows], self.document_ids[rows], self.sample[rows])


@dataclass(frozen=True)
class Targets:
    """The blocks of a batch that carry loss, in row order."""

    context: Tensor  # [V, M, D] hidden states of the block before
    tokens: Tensor  # [V, M]
    valid: Tensor  # [V, M] bool: False after a document's first EOS
    sample: Tensor  # [V]
    block: Tensor  # [V] index of the target block in its sequence


def target_mask(batch: Batch, block_size: int, eos: int) -> Tensor:
    """Which tokens carry loss: [B, S] bool.

    A block is a target if the block before it belongs to the same document, so a document's BOS block is input only; EOS padding
    after the first EOS carries none (method, section 3).
    """
    blocks = batch.document_ids.unflatten(1, (-1, block_size))
    follows = torch.zeros_like(blocks, dtype=torch.bool)
    follows[:, 1:] = (blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] >= 0)
    is_eos = (batch.tokens == eos).unflatten(1, (-1, block_size))
    before = is_eos.cumsum(-1) - is_eos.long()
    return (follows & (before == 0)).flatten(1)


class BitLM(nn.Module):
    """The whole model of one pipeline stage that is both first and last.

    Args:
        config: checked.
        codes: assignment of codes to tokens; its B wins over ``model.bits``.
        eos: id that ends a document.
    """

    def __init__(self, config: Config, codes: BitCodes, eos: int) -> None:
        super().__init__()
        self.config, self.eos = config, eos
        self.block_size = config.model.block_size
        self.codes = codes
        self.embedding = BitEmbedding(codes.bits, config.model.backbone.width)
        self.backbone = Backbone(config.model)
        self.head = DiffusionHead(config, codes.bits)
        diffusion = config.diffusion
        self.noise_law = NoiseLaw(
            diffusion.time, diffusion.draws, diffusion.per_token, diffusion.per_token_sigma, diffusion.context_dropout
        )

    def hidden(self, tokens: Tensor, document_ids: Tensor | None = None, flips: Tensor | None = None) -> Tensor:
        """tokens [B, S] -> C [B, S, D]; ``flips`` [B, S, K] of +1 and -1 multiplies the input bits."""
        bits = self.codes.encode(tokens)
        return self.backbone(self.embedding(bits if flips is None else bits * flips), document_ids)

    def targets(self, batch: Batch, hidden: Tensor) -> Targets:
        """Pick the blocks that carry loss, each with the states of the block before it (one-block shift)."""
        m = self.block_size
        valid = target_mask(batch, m, self.eos).unflatten(1, (-1, m))
        row, block = valid.any(-1).nonzero(as_tuple=True)
        return Targets(
            context=hidden.unflatten(1, (-1, m))[row, block - 1],
            tokens=batch.tokens.unflatten(1, (-1, m))[row, block],
            valid=valid[row, block],
            sample=batch.sample[row],
            block=block,
        )

    def loss(self, batch: Batch, *, seed: int, step: int) -> Tensor:
        """Sum of the loss over the batch's valid tokens, a mean over draws and bits; divide by the global count of valid tokens.

        The noise depends on (seed, step, sample, block, draw) alone.
        """
        hidden = self.hidden(batch.tokens, batch.document_ids, self._flips(batch, seed, step))
        targets = self.targets(batch, hidden)
        clean = self.codes.encode(targets.tokens)
        output = self.head.output
        source = Source(seed, targets.sample, targets.block, step)
        draws = list(training_draws(self.noise_law, (self.block_size, self.codes.bits), source))
        # The context is dropped per block, not per draw: the backbone's states are read once.
        context = self.head.read(targets.context, draws[0].keep)
        t = torch.stack([draw.t for draw in draws])
        noisy = add_noise(clean, torch.stack([draw.eps for draw in draws]), t)
        raw = self.head(noisy, t, context.broadcast(len(draws)))
        with exact(noisy):
            loss = output.loss(raw, noisy, t, clean.expand(noisy.shape)).mean(0)
            if context.logits is not None:
                loss = loss - output.log_prob(context.logits, clean) / self.codes.bits
            return (loss * targets.valid).sum()

    def _flips(self, batch: Batch, seed: int, step: int) -> Tensor | None:
        """Input bits flipped with probability p·U, one U a sequence (BitDance), or None where the switch is off."""
        most = self.config.diffusion.input_bit_flips
        if most == 0:
            return None
        # block 0 names the sequence's own U, block 1 + i the flips of token i
        sequences, places = batch.sample.unsqueeze(1), torch.arange(1 + batch.tokens.shape[1], device=batch.tokens.device)
        u = Source(seed, sequences, places.unsqueeze(0), step).uniforms(noise.BIT_FLIPS, self.codes.bits)
        return torch.where(u[:, 1:] < most * u[:, :1, :1], -1.0, 1.0)
