"""What every model of this project shares: batches in, a causal backbone, the blocks that carry loss (paper, section 3).

Legend: B batch, S sequence, N blocks a sequence, M tokens a block, K bits, D width, V valid target blocks of a batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitlm_dist.config import Config
from bitlm_dist.model.backbone import Backbone
from bitlm_dist.model.initialization import initialize_layers
from bitlm_dist.parallel.layout import ALONE, Layout, Stage


@dataclass(frozen=True)
class Place:
    """Where a stage stands."""

    layout: Layout
    stage: Stage
    layers_per_stage: list[int]

    @classmethod
    def alone(cls, layers: int) -> "Place":
        """One process that holds everything."""
        return cls(ALONE, Stage(range(layers)), [layers])


@dataclass(frozen=True)
class Batch:
    """Packed sequences, see :mod:`bitlm_dist.data.packing`."""

    tokens: Tensor  # [B, S] int64
    document_ids: Tensor  # [B, S] int64, -1 where the sequence is padding
    sample: Tensor  # [B] int64, global index of each sequence
    drawn: Tensor | None = None  # [R, B, S] int64, what a teacher would write at each place

    def to(self, device: torch.device) -> "Batch":
        """On a device. To a GPU it is copied from pinned memory without blocking the host, queued behind work already launched."""

        def moved(x: Tensor) -> Tensor:
            if device.type == "cuda" and x.device.type == "cpu":
                return x.pin_memory().to(device, non_blocking=True)
            return x.to(device)

        drawn = None if self.drawn is None else moved(self.drawn)
        return Batch(moved(self.tokens), moved(self.document_ids), moved(self.sample), drawn)

    def part(self, rows: slice) -> "Batch":
        """Some of the sequences: a microbatch."""
        drawn = None if self.drawn is None else self.drawn[:, rows]
        return Batch(self.tokens[rows], self.document_ids[rows], self.sample[rows], drawn)


@dataclass(frozen=True)
class Targets:
    """The blocks of a batch that carry loss, in row order."""

    context: Tensor  # [V, M, D] hidden states of the block before
    tokens: Tensor  # [V, M]
    valid: Tensor  # [V, M] bool: False after a document's first EOS
    sample: Tensor  # [V]
    block: Tensor  # [V] index of the target block in its sequence
    drawn: Tensor | None = None  # [R, V, M], what a teacher would write instead of the tokens


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


class LanguageModel(nn.Module, ABC):
    """One stage of the model; with one process, all of it.

    Args:
        config: checked.
        eos: id that ends a document.
        place: the layout, and which stage of it this is; None: all of the model on one process.
    """

    def __init__(self, config: Config, eos: int, place: Place | None) -> None:
        super().__init__()
        from megatron.core.enums import ModelType

        place = Place.alone(config.model.backbone.layers) if place is None else place
        self.config, self.eos, self.place = config, eos, place
        self.block_size = config.model.block_size
        # Megatron's schedules and reductions ask a stage for these
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = place.stage.embeds, place.stage.predicts
        self.share_embeddings_and_output_weights = False
        self.loss_copies = 1  # tensor ranks whose loss is one and the same
        self.vp_stage = place.stage.chunk if place.layout.virtual > 1 else None
        self.backbone = Backbone(config, place.layout, place.stage, place.layers_per_stage)
        initialize_layers(
            self.backbone,
            place.stage.layers.start,
            config.model.backbone.layers,
            config.training.seed,
            place.layout.tensor_rank,
            place.layout.tensor,
        )

    @abstractmethod
    def embed(self, tokens: Tensor, flips: Tensor | None) -> Tensor:
        """tokens [B, S] -> [B, S, D], first stage only; ``flips`` [B, S, K] of +1 and -1 multiplies input bits."""

    @abstractmethod
    def loss_of(self, states: Tensor, positions: Tensor, batch: Batch, *, seed: int, step: int) -> Tensor:
        """Sum of the loss over the batch's valid tokens that follow ``states`` [B, S, D] at ``positions`` [S]; last stage only."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The model's parts by the name that reports give them."""

    def flips(self, batch: Batch, *, seed: int, step: int) -> Tensor | None:
        """Signs that training multiplies the input bits with, or None."""
        return None

    def forward(self, batch: Batch, *, seed: int, step: int) -> Tensor:
        """The stage's output [S, B, D], in Megatron's order, S the tokens of this rank: for the next stage or for the loss."""
        embedded = self.own_embedded(batch, seed=seed, step=step) if self.place.stage.embeds else None
        hidden: Tensor = self.backbone(embedded, batch.document_ids, batch.tokens.shape[1])
        return hidden

    def own_embedded(self, batch: Batch, *, seed: int, step: int) -> Tensor:
        """What the first layer of this rank reads: [S, B, D]."""
        layout = self.place.layout
        mine = layout.positions(batch.tokens.shape[1], batch.tokens.device)
        mine = layout.own(mine) if layout.sequence else mine
        flips = self.flips(batch, seed=seed, step=step)
        embedded = self.embed(batch.tokens[:, mine], None if flips is None else flips[:, mine])
        return embedded.transpose(0, 1).contiguous()

    def own_states(self, hidden: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The last stage's output [S, B, D] -> what this rank's head handles of it: states [B, S', D], their positions [S']."""
        layout = self.place.layout
        positions = layout.own(layout.positions(length, hidden.device))
        if layout.tensor > 1 and not layout.sequence:
            from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region

            hidden = scatter_to_sequence_parallel_region(hidden)
        return hidden.transpose(0, 1), positions

    def loss(self, batch: Batch, *, seed: int, step: int) -> Tensor:
        """Sum of the loss over the batch's valid tokens; divide by the global count of valid tokens. For a model of one stage.

        The noise depends on (seed, step, sample, block, draw) alone.
        """
        return self.loss_after(self(batch, seed=seed, step=step), batch, seed=seed, step=step)

    def loss_after(self, hidden: Tensor, batch: Batch, *, seed: int, step: int) -> Tensor:
        """This rank's part of :meth:`loss` from the last stage's output [S, B, D]."""
        states, positions = self.own_states(hidden, batch.tokens.shape[1])
        return self.loss_of(states, positions, batch, seed=seed, step=step)

    def hidden(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """tokens [B, S] -> C [B, S, D], on one process."""
        embedded = self.embed(tokens, None).transpose(0, 1).contiguous()
        hidden: Tensor = self.backbone(embedded, document_ids, tokens.shape[1]).transpose(0, 1)
        return hidden

    def set_input_tensor(self, tensors: list[Tensor]) -> None:
        """Megatron's schedule hands over what the stage before sent."""
        self.backbone.block.set_input_tensor(tensors[0] if isinstance(tensors, list) else tensors)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While open, :meth:`hidden` continues the tokens of the calls before, and no weight may change."""
        with self.backbone.decoding():
            yield

    def targets(self, batch: Batch, states: Tensor, positions: Tensor | None = None) -> Targets:
        """Pick the blocks that carry loss, each with the states of the block before it (one-block shift).

        Args:
            states: [B, S, D], whole blocks.
            positions: their places in the sequence [S]; None: all of it.
        """
        m = self.block_size
        valid = target_mask(batch, m, self.eos).unflatten(1, (-1, m))
        following = torch.arange(1, valid.shape[1] + 1, device=valid.device)
        if positions is not None:
            following = positions[::m] // m + 1
        inside = following < valid.shape[1]
        row, place = (valid.any(-1)[:, following.clamp_max(valid.shape[1] - 1)] & inside).nonzero(as_tuple=True)
        block = following[place]
        return Targets(
            context=states.unflatten(1, (-1, m))[row, place],
            tokens=batch.tokens.unflatten(1, (-1, m))[row, block],
            valid=valid[row, block],
            sample=batch.sample[row],
            block=block,
            drawn=None if batch.drawn is None else batch.drawn.unflatten(-1, (-1, m))[:, row, block],
        )
