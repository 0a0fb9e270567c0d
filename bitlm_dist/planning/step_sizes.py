"""Sizes of a step that decide how much memory its activations take."""

from dataclasses import dataclass

from bitlm_dist.config import Config
from bitlm_dist.parallel.layout import ParallelLayout, resolve_micro_batch_size
from bitlm_dist.planning.state_memory import weight_bytes


@dataclass(frozen=True)
class StepSizes:
    """Sizes of a step on one rank.

    Attributes:
        tokens: tokens per microbatch in the backbone's layers, before sequence parallelism.
        head_tokens: tokens per microbatch whose loss the rank computes.
        num_microbatches: per step.
        width: bytes per element of weights and activations.
    """

    tokens: float
    head_tokens: float
    num_microbatches: int
    width: int

    @classmethod
    def of(cls, config: Config, layout: ParallelLayout) -> "StepSizes":
        """Sizes for a config and a layout.

        Raises:
            UserError: the global batch cannot be split over the layout.
        """
        micro_batch_size = resolve_micro_batch_size(config, layout)
        tokens = micro_batch_size * config.data.sequence_length / layout.context
        # Tensor ranks share the blocks of a head, and the vocabulary of a softmax.
        parts = layout.tensor if config.model.output == "bits" else 1
        num_sequences = config.training.global_batch_tokens // config.data.sequence_length
        num_microbatches = num_sequences // layout.data // micro_batch_size
        return cls(tokens, tokens / parts, num_microbatches, weight_bytes(config))
