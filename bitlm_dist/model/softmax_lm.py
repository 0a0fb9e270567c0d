"""The baseline: the same backbone with an embedding table and a softmax over the vocabulary.

Legend: B batch, S sequence, T tokens, D hidden size, V vocabulary, R samples per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from bitlm_dist.config import Config
from bitlm_dist.model.batch import Batch
from bitlm_dist.model.language_model import (
    LanguageModel,
    PipelineStage,
    Targets,
    TargetScores,
)
from bitlm_dist.model.vocab_parallel_table import VocabParallelTable

MAX_LOGITS_PER_CHUNK = 2**27  # elements of a chunk of logits, where no gradient is needed
IGNORED = -100  # in place of a target token that carries no loss

try:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as _fused
except ImportError:  # the extra `liger` is not installed
    _fused = None


class SoftmaxLM(LanguageModel):
    """Autoregressive language model; ``model.block_size`` is 1, so attention is causal.

    The tensor ranks split both tables by vocabulary, and with them the work of the output: each
    rank sees all states, and Megatron's cross-entropy combines the logits of all ranks.

    Args:
        config: a validated config.
        vocab_size: V.
        eos: id of the token that ends a document.
        pipeline_stage: the part of the model to build; None: the full model.
    """

    has_exact_likelihood = True

    def __init__(
        self, config: Config, vocab_size: int, eos: int, pipeline_stage: PipelineStage | None = None
    ) -> None:
        assert config.model.block_size == 1
        super().__init__(config, eos, pipeline_stage)
        width = config.model.backbone.hidden_size
        layout = self.pipeline_stage.layout

        if self.pipeline_stage.model_chunk.is_first:
            self.embedding = VocabParallelTable(vocab_size, width, layout)

        if self.pipeline_stage.model_chunk.is_last:
            tied = config.model.tie_embeddings
            self.output = self.embedding if tied else VocabParallelTable(vocab_size, width, layout)

        # The cross-entropy over the split vocabulary yields the full loss on every tensor rank.
        self.loss_replication = layout.tensor

    @override
    def embed(self, tokens: Tensor, sign_flips: Tensor | None) -> Tensor:
        return self.embedding(tokens)

    @override
    def local_embeddings(self, batch: Batch, *, seed: int, step: int) -> Tensor:
        """Input of the first layer on this rank: the sum of the tensor ranks' partial look-ups."""
        layout = self.pipeline_stage.layout
        if layout.tensor == 1:
            return super().local_embeddings(batch, seed=seed, step=step)

        from megatron.core.tensor_parallel import mappings

        positions = layout.local_positions(batch.tokens.shape[1], batch.tokens.device)
        embedded = self.embed(batch.tokens[:, positions], None).transpose(0, 1).contiguous()

        if layout.sequence:
            scattered: Tensor = mappings.reduce_scatter_to_sequence_parallel_region(embedded)
            return scattered
        summed: Tensor = mappings.reduce_from_tensor_model_parallel_region(embedded)
        return summed

    @override
    def state_positions(self, sequence_length: int, device: torch.device | None = None) -> Tensor:
        return self.pipeline_stage.layout.local_positions(sequence_length, device)

    @override
    def local_hidden_states(self, hidden: Tensor) -> Tensor:
        """Give every tensor rank all states of its context rank."""
        layout = self.pipeline_stage.layout
        if layout.tensor > 1:
            from megatron.core.tensor_parallel import mappings

            if layout.sequence:
                hidden = mappings.gather_from_sequence_parallel_region(hidden)
            else:
                hidden = mappings.copy_to_tensor_model_parallel_region(hidden)
                # Megatron reduces the gradient in place, and silently returns a non-contiguous
                # gradient unreduced.
                if hidden.requires_grad:
                    hidden.register_hook(torch.Tensor.contiguous)

        return hidden.transpose(0, 1)

    @override
    def compute_loss(
        self, hidden_states: Tensor, batch: Batch, *, seed: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """Sum -log p over the valid tokens, in nats; deterministic, so seed and step are unused."""
        targets = self.targets(batch, hidden_states)
        hidden = targets.context_hidden.flatten(0, 1)
        tokens = targets.tokens.flatten().where(targets.valid.flatten(), IGNORED)
        no_terms = hidden.new_empty(0)

        if self.pipeline_stage.layout.tensor > 1:
            from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

            parallel_losses: Tensor = vocab_parallel_cross_entropy(
                self.output.logits(hidden).float(), targets.tokens.flatten()
            )
            return (parallel_losses * targets.valid.flatten()).sum(), no_terms

        if hidden.is_cuda and _fused is not None:
            fused_loss: Tensor = _fused(
                hidden,
                self.output.rows[: self.output.vocab_size],
                tokens,
                reduction="sum",
                ignore_index=IGNORED,
            )
            return fused_loss, no_terms

        # Nothing is faster on a CPU: torch's chunked linear_cross_entropy takes many times as long,
        # and recomputing the logits twice as long.
        logits = self.output.logits(hidden).float()
        return F.cross_entropy(logits, tokens, reduction="sum", ignore_index=IGNORED), no_terms

    def _rows_per_chunk(self) -> int:
        return max(1, MAX_LOGITS_PER_CHUNK // self.output.vocab_size)

    @torch.no_grad()
    def nll(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Negative log-probability of each token, without gradient, in chunks of bounded size.

        Args:
            hidden: [T, D], the state before each token.
            tokens: [T].

        Returns:
            [T], in nats.
        """
        chunks = zip(
            hidden.split(self._rows_per_chunk()), tokens.split(self._rows_per_chunk()), strict=True
        )
        return torch.cat(
            [F.cross_entropy(self.output.logits(h).float(), y, reduction="none") for h, y in chunks]
        )

    @override
    def score_targets(
        self, targets: Targets, *, num_noise_levels: int, seed: int, shuffle_context: bool
    ) -> TargetScores:
        """Score with the exact likelihood; nothing is sampled."""
        hidden = targets.context_hidden[targets.valid]
        tokens = targets.tokens[targets.valid]

        shuffled_context_nats = None
        if shuffle_context and len(tokens) > 1:
            shuffled_context_nats = self.nll(hidden.roll(len(hidden) // 2, 0), tokens)
        return TargetScores(self.nll(hidden, tokens), shuffled_context_nats)

    @torch.no_grad()
    def sample_tokens(self, hidden: Tensor, u: Tensor, temperature: float) -> Tensor:
        """Sample next tokens by inverting the cumulative distribution.

        Args:
            hidden: [T, D].
            u: uniform random numbers [T, R].
            temperature: divides the logits; 0 takes the most probable token.

        Returns:
            Token ids [T, R].
        """
        chunks = zip(
            hidden.split(self._rows_per_chunk()), u.split(self._rows_per_chunk()), strict=True
        )
        return torch.cat([self._sample_chunk(h, v, temperature) for h, v in chunks])

    def _sample_chunk(self, hidden: Tensor, u: Tensor, temperature: float) -> Tensor:
        logits = self.output.logits(hidden).float()
        if temperature == 0:
            return logits.argmax(-1, keepdim=True).expand_as(u)

        # Rounding can leave the last sum below or above one: scale u by it, and clamp the index.
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        return torch.searchsorted(cumulative, u * cumulative[:, -1:]).clamp_max(
            logits.shape[-1] - 1
        )

    @override
    def components(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "input": self.embedding, "output": self.output}
