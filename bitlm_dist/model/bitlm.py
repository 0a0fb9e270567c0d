"""BitLM: bits in, block-causal backbone, one-block shift, diffusion head (paper, section 3).

Legend: B batch, S sequence, K bits, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from typing_extensions import override

from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.likelihood import NelboEstimate, autoregressive_nll, estimate_nelbo
from bitlm_dist.diffusion.noise import NoiseKey
from bitlm_dist.model.batch import Batch, rows_and_columns
from bitlm_dist.model.bit_embedding import BitEmbedding
from bitlm_dist.model.head_loss import HeadBatch, HeadLoss
from bitlm_dist.model.heads.base import Conditioning
from bitlm_dist.model.heads.bitlm import BitLMHead
from bitlm_dist.model.heads.build import build_head
from bitlm_dist.model.initialization import Embedding
from bitlm_dist.model.language_model import (
    LanguageModel,
    PipelineStage,
    Targets,
    TargetScores,
)


class BitLM(LanguageModel):
    """Language model that denoises the bits of the next block with a diffusion head.

    Args:
        config: a validated config.
        codes: assignment of codes to tokens; its number of bits takes precedence over
            ``model.bits``.
        eos: id of the token that ends a document.
        pipeline_stage: the part of the model to build; None: the full model.
    """

    def __init__(
        self, config: Config, codes: BitCodes, eos: int, pipeline_stage: PipelineStage | None = None
    ) -> None:
        super().__init__(config, eos, pipeline_stage)
        self.codes = codes
        width = config.model.backbone.hidden_size

        if self.pipeline_stage.model_chunk.is_first:
            self.embedding = (
                Embedding(codes.vocab_size, width)
                if config.model.input == "table"
                else BitEmbedding(codes.num_bits, width, config.model.input_window)
            )

        if self.pipeline_stage.model_chunk.is_last:
            self.head = build_head(config, codes.num_bits)
            # A bound method and not the module, so that each head parameter has a single name.
            # The engine that shards the head replaces it.
            self.head_loss: Callable[[HeadBatch], tuple[Tensor, Tensor]] = HeadLoss(
                config, codes, self.head
            ).__call__

    @property
    @override
    def has_next_token_loss(self) -> bool:
        # With blocks of one token, the loss of the context logits is already that loss.
        return self.config.diffusion.next_token_loss_weight > 0 and self.block_size > 1

    @override
    def embed(self, tokens: Tensor, sign_flips: Tensor | None) -> Tensor:
        if self.config.model.input == "table":
            embedded: Tensor = self.embedding(tokens)
            return embedded

        bits = self.codes.ids_to_bits(tokens)
        embedded = self.embedding(bits if sign_flips is None else bits * sign_flips)
        return embedded

    @override
    def components(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "head": self.head, "input": self.embedding}

    @override
    @contextmanager
    def decoding(self) -> Iterator[None]:
        with super().decoding(), self.head.decoding():
            yield

    @override
    def compute_loss(
        self, hidden_states: Tensor, batch: Batch, *, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """Sum the loss over valid tokens; per token it is a mean over noise samples and bits."""
        index = self.find_targets(batch)
        targets = self.targets(batch, hidden_states, index)
        tokens = targets.tokens.unsqueeze(0)

        row, column = rows_and_columns(index.states, hidden_states.shape[1])
        sequence, position = rows_and_columns(index.next_positions, batch.tokens.shape[1])
        next_tokens = batch.tokens[sequence, position].unsqueeze(0)
        if batch.teacher_tokens is not None and targets.teacher_tokens is not None:
            tokens = torch.cat((tokens, targets.teacher_tokens))
            next_tokens = torch.cat((next_tokens, batch.teacher_tokens[:, sequence, position]))

        return self.head_loss(
            HeadBatch(
                context=targets.context_hidden,
                states=hidden_states[row, column],
                tokens=tokens,
                valid=targets.valid,
                next_tokens=next_tokens,
                next_valid=index.next_valid,
                next_position=position % self.block_size,
                sequence_index=targets.sequence_index,
                block_index=targets.block_index,
                seed=seed,
                step=step,
            )
        )

    @override
    def input_sign_flips(self, batch: Batch, *, seed: int, step: int) -> Tensor | None:
        """Flip input bits with probability p·U, one U per sequence (BitDance); None if p = 0."""
        max_flip_prob = self.config.diffusion.input_bit_flips
        if max_flip_prob == 0:
            return None

        # block index 0 keys the U of the sequence, block index 1 + i the flips of token i
        sequence_indices = batch.sequence_index.unsqueeze(1)
        block_indices = torch.arange(1 + batch.tokens.shape[1], device=batch.tokens.device)
        u = NoiseKey(seed, sequence_indices, block_indices.unsqueeze(0), step).uniform(
            noise.BIT_FLIP_STREAM, self.codes.num_bits
        )
        return torch.where(u[:, 1:] < max_flip_prob * u[:, :1, :1], -1.0, 1.0)

    @override
    def score_targets(
        self, targets: Targets, *, num_noise_levels: int, seed: int, shuffle_context: bool
    ) -> TargetScores:
        """Score with the bound and, if the head has one, the chain rule."""
        head = self.head
        valid = targets.valid
        clean = self.codes.ids_to_bits(targets.tokens)
        noise_key = NoiseKey(seed, targets.sequence_index, targets.block_index)

        def bound(conditioning: Conditioning) -> NelboEstimate:
            return estimate_nelbo(
                head.denoisers(conditioning),
                clean,
                num_noise_levels=num_noise_levels,
                noise_key=noise_key,
                valid=valid,
            )

        conditioning = head.condition(targets.context_hidden)
        result = bound(conditioning)

        # A model that uses its context must do worse with the context of another block.
        shuffled_context_nats = autoregressive_nats = None
        if shuffle_context and len(clean) > 1:  # a single block has no other context to borrow
            other_context = targets.context_hidden.roll(len(clean) // 2, 0)
            shuffled_context_nats = bound(head.condition(other_context)).nelbo[valid]

        if isinstance(head, BitLMHead) and "autoregressive" in head.loss_terms:
            autoregressive_nats = -head.output.log_prob(
                head.autoregress(clean, conditioning), clean
            )[valid]
        # Else only per-token noise or one-token blocks give the denoiser a chain rule.
        elif self.config.diffusion.per_token_noise_prob > 0 or self.block_size == 1:
            autoregressive_nats = autoregressive_nll(
                lambda z, t: head.denoise(z, t, conditioning), head.output, clean, noise_key
            )[valid]

        return TargetScores(
            result.nelbo[valid], shuffled_context_nats, autoregressive_nats, result.bit_accuracy
        )
