"""The baseline: the same backbone with an embedding table and a softmax over the vocabulary, one token after another.

Legend: B batch, S sequence, T tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.config import Config
from bitlm_dist.model.language_model import Batch, LanguageModel, Place
from bitlm_dist.model.vocabulary_table import VocabularyTable

SCORED_LOGITS = 2**27  # of a slice, where no gradient is needed

try:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as _fused
except ImportError:  # the extra `liger`
    _fused = None


class SoftmaxLM(LanguageModel):
    """See :class:`~bitlm_dist.model.language_model.LanguageModel`; ``model.block_size`` is 1, so attention is causal.

    Tensor ranks share both tables by vocabulary, and the work of the output with them: each sees all states, and the ranks' logits
    meet in Megatron's cross-entropy.

    Args:
        config: checked.
        vocabulary: V.
        eos: id that ends a document.
        place: which part of the model this is; None: all of it.
    """

    def __init__(self, config: Config, vocabulary: int, eos: int, place: Place | None = None) -> None:
        assert config.model.block_size == 1
        super().__init__(config, eos, place)
        width, layout, seed = config.model.backbone.width, self.place.layout, config.training.seed
        if self.place.stage.embeds:
            self.embedding = VocabularyTable(vocabulary, width, layout, seed, "embedding")
        if self.place.stage.predicts:
            tied = config.model.tied
            self.output = self.embedding if tied else VocabularyTable(vocabulary, width, layout, seed, "output")
        self.loss_copies = layout.tensor

    def embed(self, tokens: Tensor, flips: Tensor | None) -> Tensor:
        """See :class:`~bitlm_dist.model.language_model.LanguageModel`."""
        return self.embedding.look_up(tokens)

    def own_embedded(self, batch: Batch, *, seed: int, step: int) -> Tensor:
        """See :class:`~bitlm_dist.model.language_model.LanguageModel`; the tensor ranks add up what each has of the table."""
        layout = self.place.layout
        if layout.tensor == 1:
            return super().own_embedded(batch, seed=seed, step=step)
        from megatron.core.tensor_parallel import mappings

        positions = layout.positions(batch.tokens.shape[1], batch.tokens.device)
        embedded = self.embed(batch.tokens[:, positions], None).transpose(0, 1).contiguous()
        if layout.sequence:
            scattered: Tensor = mappings.reduce_scatter_to_sequence_parallel_region(embedded)
            return scattered
        summed: Tensor = mappings.reduce_from_tensor_model_parallel_region(embedded)
        return summed

    def own_states(self, hidden: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """See :class:`~bitlm_dist.model.language_model.LanguageModel`: every tensor rank has all states of its context rank."""
        layout = self.place.layout
        if layout.tensor > 1:
            from megatron.core.tensor_parallel import mappings

            if layout.sequence:
                hidden = mappings.gather_from_sequence_parallel_region(hidden)
            else:
                hidden = mappings.copy_to_tensor_model_parallel_region(hidden)
                # Megatron adds up a gradient in place, and one that is not contiguous it returns as it came, silently
                if hidden.requires_grad:
                    hidden.register_hook(torch.Tensor.contiguous)
        return hidden.transpose(0, 1), layout.positions(length, hidden.device)

    def loss_of(self, states: Tensor, positions: Tensor, batch: Batch, *, seed: int, step: int) -> Tensor:
        """See :class:`~bitlm_dist.model.language_model.LanguageModel`: -log p in nats; nothing in it is random."""
        targets = self.targets(batch, states, positions)
        hidden, tokens = targets.context[targets.valid], targets.tokens[targets.valid]
        if self.place.layout.tensor > 1:
            from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

            shared: Tensor = vocab_parallel_cross_entropy(self.output.logits(hidden).float(), tokens).sum()
            return shared
        if hidden.is_cuda and _fused is not None:
            fused: Tensor = _fused(hidden, self.output.rows[: self.output.vocabulary], tokens, reduction="sum")
            return fused
        # On a CPU nothing is faster: torch's chunked linear_cross_entropy takes many times as long, recomputing twice as long.
        return F.cross_entropy(self.output.logits(hidden).float(), tokens, reduction="sum")

    def _slice(self) -> int:
        return max(1, SCORED_LOGITS // self.output.vocabulary)

    @torch.no_grad()
    def nats(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """-log p [T] of ``tokens`` [T] after hidden states [T, D], without gradient, in slices of bounded size."""
        parts = zip(hidden.split(self._slice()), tokens.split(self._slice()), strict=True)
        return torch.cat([F.cross_entropy(self.output.logits(h).float(), y, reduction="none") for h, y in parts])

    @torch.no_grad()
    def sample(self, hidden: Tensor, u: Tensor, temperature: float) -> Tensor:
        """Token ids [T, R] after hidden states [T, D], by inverting the cumulative distribution at uniform numbers u [T, R].

        ``temperature`` divides the logits; 0 takes the likeliest.
        """
        parts = zip(hidden.split(self._slice()), u.split(self._slice()), strict=True)
        return torch.cat([self._sample(h, v, temperature) for h, v in parts])

    def _sample(self, hidden: Tensor, u: Tensor, temperature: float) -> Tensor:
        logits = self.output.logits(hidden).float()
        if temperature == 0:
            return logits.argmax(-1, keepdim=True).expand_as(u)
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        return torch.searchsorted(cumulative, u * cumulative[:, -1:]).clamp_max(logits.shape[-1] - 1)

    def parts(self) -> dict[str, nn.Module]:
        """See :class:`~bitlm_dist.model.language_model.LanguageModel`."""
        return {"backbone": self.backbone, "input": self.embedding, "output": self.output}
