"""The baseline: the same backbone with an embedding table and a softmax over the vocabulary, one token after another.

Legend: B batch, S sequence, T tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlm_dist.config import Config
from bitlm_dist.model.bit_embedding import token_table
from bitlm_dist.model.initialization import drawn_from
from bitlm_dist.model.language_model import Batch, LanguageModel, Place

SCORED_LOGITS = 2**27  # of a slice, where no gradient is needed

try:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as _fused
except ImportError:  # the extra `liger`
    _fused = None


class SoftmaxLM(LanguageModel):
    """See :class:`~bitlm_dist.model.language_model.LanguageModel`; ``model.block_size`` is 1, so attention is causal.

    Args:
        config: checked.
        vocabulary: V.
        eos: id that ends a document.
    """

    def __init__(self, config: Config, vocabulary: int, eos: int, place: Place | None = None) -> None:
        assert config.model.block_size == 1
        super().__init__(config, eos, place)
        width, seed = config.model.backbone.width, config.training.seed
        if self.place.stage.embeds:
            with drawn_from(seed, "embedding"):
                self.embedding = token_table(vocabulary, width)
        if self.place.stage.predicts:
            with drawn_from(seed, "output"):
                self.output = nn.Linear(width, vocabulary, bias=False)
                nn.init.normal_(self.output.weight, std=0.02)
            if config.model.tied:
                self.output.weight = self.embedding.weight

    def embed(self, tokens: Tensor, flips: Tensor | None) -> Tensor:
        """See :class:`~bitlm_dist.model.language_model.LanguageModel`."""
        embedded: Tensor = self.embedding(tokens)
        return embedded

    def loss_of(self, states: Tensor, positions: Tensor, batch: Batch, *, seed: int, step: int) -> Tensor:
        """See :class:`~bitlm_dist.model.language_model.LanguageModel`: -log p in nats; nothing in it is random."""
        targets = self.targets(batch, states, positions)
        hidden, tokens = targets.context[targets.valid], targets.tokens[targets.valid]
        if hidden.is_cuda and _fused is not None:
            fused: Tensor = _fused(hidden, self.output.weight, tokens, reduction="sum")
            return fused
        # On a CPU nothing is faster: torch's chunked linear_cross_entropy takes many times as long, recomputing twice as long.
        return F.cross_entropy(self.output(hidden).float(), tokens, reduction="sum")

    @torch.no_grad()
    def nats(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """-log p [T] of ``tokens`` [T] after hidden states [T, D], without gradient, in slices of bounded size."""
        rows = max(1, SCORED_LOGITS // self.output.out_features)
        parts = zip(hidden.split(rows), tokens.split(rows), strict=True)
        return torch.cat([F.cross_entropy(self.output(h).float(), y, reduction="none") for h, y in parts])

    @torch.no_grad()
    def sample(self, hidden: Tensor, u: Tensor, temperature: float) -> Tensor:
        """Token ids [T, R] after hidden states [T, D], by inverting the cumulative distribution at uniform numbers u [T, R].

        ``temperature`` divides the logits; 0 takes the likeliest.
        """
        rows = max(1, SCORED_LOGITS // self.output.out_features)
        return torch.cat([self._sample(h, v, temperature) for h, v in zip(hidden.split(rows), u.split(rows), strict=True)])

    def _sample(self, hidden: Tensor, u: Tensor, temperature: float) -> Tensor:
        logits = self.output(hidden).float()
        if temperature == 0:
            return logits.argmax(-1, keepdim=True).expand_as(u)
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        return torch.searchsorted(cumulative, u * cumulative[:, -1:]).clamp_max(self.output.out_features - 1)

    def parts(self) -> dict[str, nn.Module]:
        """See :class:`~bitlm_dist.model.language_model.LanguageModel`."""
        return {"backbone": self.backbone, "input": self.embedding, "output": self.output}
