"""What every diffusion head offers.

Legend: N blocks (any leading shape), M tokens per block, K bits, D hidden size of the backbone,
W hidden size of the head.
"""

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Generic, TypeVar

from torch import Tensor, nn

from bitlm_dist.diffusion.outputs import OutputDistribution
from bitlm_dist.diffusion.sampler import Denoisers

C = TypeVar("C", bound="Conditioning")


@dataclass(frozen=True)
class Conditioning:
    """Conditioning derived from the hidden states.

    It is computed once and reused for every noise sample and denoising step. A head may add fields:
    tensors begin with N.
    """

    hidden_states: Tensor  # [N, M, D]
    projected: Tensor  # [N, M, W]

    def expand(self: C, num_noise_samples: int) -> C:
        """Repeat for several noise samples: [num_noise_samples, N, M, ...]."""
        per_block = {
            field.name: value.expand(num_noise_samples, *value.shape)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **per_block)


class Head(nn.Module, Generic[C]):
    """A diffusion head, with conditioning of class C.

    Call ``conditioning = head.condition(hidden)`` once, then :meth:`denoise` for every noise level;
    ``head.output`` interprets the result, called raw output.

    Attributes:
        output: the distribution of a token's bits, given the raw output.
        blocks: the Transformer layers, which an engine may gather one by one.
    """

    output: OutputDistribution
    blocks: nn.ModuleList

    @property
    @abstractmethod
    def loss_terms(self) -> tuple[str, ...]:
        """Terms of the loss that the head can be trained with.

        Of :data:`~bitlm_dist.model.loss_terms.TERMS`; those but ``denoising`` need the methods of
        :class:`~bitlm_dist.model.heads.bitlm.BitLMHead`.
        """

    @abstractmethod
    def condition(self, hidden: Tensor, keep_mask: Tensor | None = None) -> C:
        """Compute the conditioning from the hidden states of the previous block.

        Args:
            hidden: [N, M, D], C in the paper.
            keep_mask: [N]; blocks where it is False get the learned null embedding instead.
        """

    @abstractmethod
    def unconditional(self, conditioning: C) -> C:
        """Conditioning of the null embedding, shaped like ``conditioning``, for guidance."""

    @abstractmethod
    def denoise(self, noisy: Tensor, t: Tensor, conditioning: C) -> Tensor:
        """Compute the raw output [N, M, num_logits].

        Args:
            noisy: bits [N, M, K].
            t: times that broadcast to [N, M].
        """

    @abstractmethod
    def denoisers(self, conditioning: C) -> Denoisers:
        """Build the denoisers that a sampler calls.

        Work that is independent of the noise is done once, and work that is independent of the bits
        is done for all times at once.

        Returns:
            A function from times [S, N, M], or times that broadcast to it, to S functions, each of
            which maps noisy bits [N, M, K] to A0_hat, the estimate of the clean bits.
        """

    def decoding(self) -> AbstractContextManager[None]:
        """Context that caches what depends on the weights alone; they must not change in it."""
        return nullcontext()
