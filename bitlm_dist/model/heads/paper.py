"""The head of the BitLM paper (section 3.3), to the letter.

Legend: N blocks (any leading shape), M tokens per block, K bits, D hidden size of the backbone,
W hidden size of the head.
"""

from collections.abc import Callable

from torch import Tensor
from typing_extensions import override

from bitlm_dist.config import Config
from bitlm_dist.diffusion.outputs import BitOutput
from bitlm_dist.model.heads.base import Conditioning
from bitlm_dist.model.heads.blocks import AdaLNHead, Modulation
from bitlm_dist.model.initialization import Linear, zero_linear


class PaperHead(AdaLNHead[Conditioning]):
    """Predicts the clean bits themselves: A0_hat = Head(A_t, t; C).

    State i of the previous block modulates token i, together with the time. An untrained head
    predicts zero.
    """

    def __init__(self, config: Config, num_bits: int) -> None:
        super().__init__(config, num_bits)
        self.output = BitOutput(num_bits, config.diffusion.loss, config.diffusion.time_distribution)
        self.final = zero_linear(Linear(config.head.hidden_size, num_bits))

    @property
    @override
    def loss_terms(self) -> tuple[str, ...]:
        return ("denoising",)

    @override
    def condition(self, hidden: Tensor, keep_mask: Tensor | None = None) -> Conditioning:
        hidden = self.keep_or_null(hidden, keep_mask)
        return Conditioning(hidden, self.context_in(hidden))

    @override
    def denoise(self, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self._predict(noisy, self.modulate(t, conditioning))

    def _predict(self, noisy: Tensor, modulation: Modulation) -> Tensor:
        predicted: Tensor = self.final(self.features(self.bits_in(noisy), modulation))
        return predicted

    @override
    def estimator(
        self, conditioning: Conditioning
    ) -> Callable[[Tensor, Modulation, Tensor], Tensor]:
        # The modulation holds time and conditioning.
        return lambda t, modulation, noisy: self._predict(noisy, modulation).float()
