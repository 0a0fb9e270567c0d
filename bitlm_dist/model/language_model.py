"""Base class of all models: a causal backbone, and blocks that carry loss (paper, section 3).

Legend: B batch, S sequence, N blocks per sequence, M tokens per block, K bits, D hidden size,
V valid target blocks of a batch, R samples of a teacher per token.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitlm_dist.config import Config
from bitlm_dist.model.backbone import Backbone
from bitlm_dist.model.batch import Batch, TargetFinder, TargetIndex, rows_and_columns
from bitlm_dist.parallel.layout import SINGLE_PROCESS, ModelChunk, ParallelLayout


@dataclass(frozen=True)
class PipelineStage:
    """The part of the model that a module builds, and the layout that it is part of."""

    layout: ParallelLayout
    model_chunk: ModelChunk
    layers_per_stage: list[int]

    @classmethod
    def single_process(cls, num_layers: int) -> "PipelineStage":
        """Return the stage of a single process, which holds all layers."""
        return cls(SINGLE_PROCESS, ModelChunk(range(num_layers)), [num_layers])


@dataclass(frozen=True)
class Targets:
    """The blocks of a batch that carry loss, ordered by sequence, then by position."""

    context_hidden: Tensor  # [V, M, D] hidden states of the block before
    tokens: Tensor  # [V, M]
    valid: Tensor  # [V, M] bool, False after a document's first EOS
    sequence_index: Tensor  # [V]
    block_index: Tensor  # [V] index of the target block in its sequence
    teacher_tokens: Tensor | None = None  # [R, V, M], a teacher's samples in place of the tokens


@dataclass(frozen=True)
class TargetScores:
    """Scores of the T predicted tokens of some target blocks."""

    nats: Tensor  # [T]
    shuffled_context_nats: Tensor | None = None  # [T], the same, given the context of another block
    autoregressive_nats: Tensor | None = None  # [T], the same by the chain rule
    bit_accuracy: Tensor | None = None  # [S], by stratum of the noise level


class LanguageModel(nn.Module, ABC):
    """One pipeline stage of a model; on a single process, the full model.

    Random weights are unset; :func:`~bitlm_dist.model.build.build_model` draws them.

    Args:
        config: a validated config.
        eos: id of the token that ends a document.
        pipeline_stage: the layout and the stage to build; None: the full model on one process.
    """

    has_exact_likelihood: ClassVar[bool] = False  # False: the scores are upper bounds

    def __init__(self, config: Config, eos: int, pipeline_stage: PipelineStage | None) -> None:
        super().__init__()
        from megatron.core.enums import ModelType

        pipeline_stage = (
            PipelineStage.single_process(config.model.backbone.num_layers)
            if pipeline_stage is None
            else pipeline_stage
        )
        layout = pipeline_stage.layout
        model_chunk = pipeline_stage.model_chunk
        self.config = config
        self.eos = eos
        self.pipeline_stage = pipeline_stage
        self.block_size = config.model.block_size

        # Megatron's schedules and gradient reductions read these attributes of a stage.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = model_chunk.is_first
        self.post_process = model_chunk.is_last
        self.share_embeddings_and_output_weights = False
        self.loss_replication = 1  # number of tensor ranks that compute the same loss
        self.vp_stage = model_chunk.vp_stage if layout.virtual_pipeline > 1 else None

        self.backbone = Backbone(config, layout, model_chunk, pipeline_stage.layers_per_stage)

    @abstractmethod
    def embed(self, tokens: Tensor, sign_flips: Tensor | None) -> Tensor:
        """Embed tokens [B, S] as [B, S, D]; first stage only.

        Args:
            sign_flips: [B, S, K] of +1 and -1, factors on the input bits; None: all +1.
        """

    @abstractmethod
    def compute_loss(
        self, hidden_states: Tensor, batch: Batch, *, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """Sum the loss over the predicted tokens that follow the given states; last stage only.

        Args:
            hidden_states: [B, S', D], those that this rank's head handles.
            batch: a microbatch.

        Returns:
            The loss [], and its terms, see :func:`~bitlm_dist.model.loss_terms.pack_terms`;
            empty if the loss has a single one.
        """

    @abstractmethod
    def components(self) -> dict[str, nn.Module]:
        """Components of the model by their names in reports."""

    @abstractmethod
    def score_targets(
        self, targets: Targets, *, num_noise_levels: int, seed: int, shuffle_context: bool
    ) -> TargetScores:
        """Score the predicted tokens of target blocks, in nats; only where one process holds all.

        Args:
            num_noise_levels: strata of the noise level of a bound.
            seed: seed of the bound's noise.
            shuffle_context: also score each block given the context of another one.
        """

    @property
    def has_next_token_loss(self) -> bool:
        """True if the token after every state carries a loss of its own."""
        return False

    def input_sign_flips(self, batch: Batch, *, seed: int, step: int) -> Tensor | None:
        """Signs that multiply the input bits during training, or None."""
        return None

    def forward(self, batch: Batch, *, seed: int, step: int) -> Tensor:
        """Run this stage.

        Returns:
            Hidden states [S, B, D] for the next stage or the loss, in Megatron's order. S counts
            only the tokens on this rank.
        """
        embedded = (
            self.local_embeddings(batch, seed=seed, step=step)
            if self.pipeline_stage.model_chunk.is_first
            else None
        )
        hidden: Tensor = self.backbone(embedded, batch.document_ids, batch.tokens.shape[1])
        return hidden

    def local_embeddings(self, batch: Batch, *, seed: int, step: int) -> Tensor:
        """Input of the first layer on this rank, [S, B, D]."""
        layout = self.pipeline_stage.layout
        local_positions = layout.local_positions(batch.tokens.shape[1], batch.tokens.device)
        local_positions = (
            layout.local_head_positions(local_positions) if layout.sequence else local_positions
        )

        sign_flips = self.input_sign_flips(batch, seed=seed, step=step)
        embedded = self.embed(
            batch.tokens[:, local_positions],
            None if sign_flips is None else sign_flips[:, local_positions],
        )
        return embedded.transpose(0, 1).contiguous()

    def local_hidden_states(self, hidden: Tensor) -> Tensor:
        """Select the hidden states [B, S', D] that this rank's head handles.

        Args:
            hidden: output [S, B, D] of the last stage.
        """
        layout = self.pipeline_stage.layout

        # Sequence parallelism has split the states over the tensor ranks already.
        if layout.tensor > 1 and not layout.sequence:
            from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region

            hidden = scatter_to_sequence_parallel_region(hidden)

        return hidden.transpose(0, 1)

    def loss(self, batch: Batch, *, seed: int, step: int) -> Tensor:
        """Sum the loss over the batch's predicted tokens, for a model of one stage.

        The caller divides by the global number of predicted tokens. The noise depends on (seed,
        step, sequence, block, noise sample) alone.
        """
        loss, _ = self.loss_from_hidden(
            self(batch, seed=seed, step=step), batch, seed=seed, step=step
        )
        return loss

    def loss_from_hidden(
        self, hidden: Tensor, batch: Batch, *, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """This rank's part of :meth:`compute_loss`, from the output [S, B, D] of the last stage."""
        return self.compute_loss(self.local_hidden_states(hidden), batch, seed=seed, step=step)

    def hidden_states(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Compute the hidden states [B, S, D] of tokens [B, S] on a single process."""
        embedded = self.embed(tokens, None).transpose(0, 1).contiguous()
        hidden: Tensor = self.backbone(embedded, document_ids, tokens.shape[1]).transpose(0, 1)
        return hidden

    def set_input_tensor(self, tensors: list[Tensor]) -> None:
        """Receive the output of the previous stage from Megatron's schedule."""
        self.backbone.block.set_input_tensor(tensors[0] if isinstance(tensors, list) else tensors)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Context in which :meth:`hidden_states` continues the tokens of its previous calls.

        Keys and values are cached, so the weights must not change.
        """
        with self.backbone.decoding():
            yield

    def state_positions(self, sequence_length: int, device: torch.device | None = None) -> Tensor:
        """Positions in the sequence of the states that this rank's head handles, int64 [S']."""
        layout = self.pipeline_stage.layout
        return layout.local_head_positions(layout.local_positions(sequence_length, device))

    def target_finder(self, sequence_length: int) -> TargetFinder:
        """What finds the targets of this rank's states."""
        positions = self.state_positions(sequence_length)
        return TargetFinder(self.block_size, self.eos, self.has_next_token_loss, positions)

    def find_targets(self, batch: Batch) -> TargetIndex:
        """Which blocks and states of a microbatch carry loss, if its loader has not found them."""
        if batch.targets is not None:
            return batch.targets
        return self.target_finder(batch.tokens.shape[1]).find(batch)

    def targets(
        self, batch: Batch, hidden_states: Tensor, index: TargetIndex | None = None
    ) -> Targets:
        """Select the blocks that carry loss, each with the states of the block before it.

        This is the one-block shift of the paper.

        Args:
            batch: a microbatch.
            hidden_states: [B, S', D], this rank's states, full blocks.
            index: which blocks carry loss; None: find them.
        """
        m = self.block_size
        index = self.find_targets(batch) if index is None else index
        states = hidden_states.unflatten(1, (-1, m))
        row, column = rows_and_columns(index.context_blocks, states.shape[1])
        sequence, block_index = rows_and_columns(index.target_blocks, batch.tokens.shape[1] // m)

        return Targets(
            context_hidden=states[row, column],
            tokens=batch.tokens.unflatten(1, (-1, m))[sequence, block_index],
            valid=index.valid,
            sequence_index=batch.sequence_index[sequence],
            block_index=block_index,
            teacher_tokens=None
            if batch.teacher_tokens is None
            else batch.teacher_tokens.unflatten(-1, (-1, m))[:, sequence, block_index],
        )
