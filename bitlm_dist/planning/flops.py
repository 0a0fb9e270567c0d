"""Matrix-product FLOPs of training and generation, by component; 2 FLOPs per multiply-add.

Norms, softmaxes, elementwise operations and optimizers are not counted, as is usual for MFU. The
backward pass costs twice the forward pass.

Legend: w hidden size of the head, m tokens per block.
"""

from dataclasses import dataclass

import torch

from bitlm_dist.config import Config
from bitlm_dist.diffusion.outputs import MixtureOutput, OutputDistribution
from bitlm_dist.model.config import BackboneConfig
from bitlm_dist.model.head import (
    TIMESTEP_EMBEDDING_DIM,
    has_autoregressive_pass,
    has_conditional_groups,
    make_output_distribution,
)

BACKWARD_FACTOR = 2  # times the forward pass

# dense bf16 peak in FLOP/s, from the vendor's data sheets; matched against the device's name
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}

# peak memory bandwidth in byte/s, from the same sheets
PEAK_BANDWIDTHS = {
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "H200": 4.8e12,
    "H800": 3.35e12,
    "A100 80GB PCIe": 1.935e12,
    "A100 80GB": 2.039e12,
    "A100": 1.555e12,
    "B200": 8.0e12,
}


@dataclass(frozen=True)
class Flops:
    """FLOPs per token by component.

    Attributes:
        backbone: the Transformer.
        head: the passes of the head, per noise sample or denoising step.
        output: the logits over the vocabulary, or those of the bits.
        input: the embedding.
    """

    backbone: float
    head: float
    output: float
    input: float

    @property
    def total(self) -> float:
        """Sum over all components."""
        return self.backbone + self.head + self.output + self.input


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of a CUDA device in FLOP/s; None if unknown (a CPU, another GPU)."""
    return _lookup_device(PEAK_FLOPS, device)


def peak_bandwidth(device: torch.device) -> float | None:
    """Peak memory bandwidth of a CUDA device in byte/s; None if unknown."""
    return _lookup_device(PEAK_BANDWIDTHS, device)


def _lookup_device(table: dict[str, float], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None

    # the first match counts, so longer names come first in the tables
    name = torch.cuda.get_device_name(device)
    return next(
        (peak for card, peak in table.items() if all(word in name for word in card.split())), None
    )


def training_flops(config: Config, bits: int, vocab_size: int) -> Flops:
    """FLOPs of forward and backward per token of a training sequence.

    Args:
        config: the checked config.
        bits: bits per token.
        vocab_size: number of tokens.
    """
    # on average a position sees half of the sequence, and half of its own block or of itself
    length = config.data.sequence_length
    seen = config.model.block_size if config.model.attention == "block" else 1

    is_autoregressive = has_autoregressive_pass(config, bits)
    forward = _forward_flops(
        config,
        bits,
        vocab_size,
        config.diffusion.num_noise_samples,
        int(is_autoregressive),
        mean_context_length=(length + seen) / 2,
    )

    output = forward.output + _next_token_flops(config, bits) + _shared_readout_flops(config, bits)
    return Flops(
        *(
            component * (1 + BACKWARD_FACTOR)
            for component in (forward.backbone, forward.head, output, forward.input)
        )
    )


def _next_token_flops(config: Config, bits: int) -> float:
    """Forward FLOPs per token of the next-token loss."""
    is_trained = config.diffusion.next_token_loss_weight and config.model.block_size > 1
    if not is_trained or config.model.output != "bits":
        return 0.0

    hidden_size = config.model.backbone.hidden_size
    num_logits = make_output_distribution(config, bits).num_logits
    return 2.0 * hidden_size * (num_logits + (hidden_size if config.head.context_ahead else 0))


def _shared_readout_flops(config: Config, bits: int) -> float:
    """Forward FLOPs per token of the product of the shared readout's two matrices."""
    if not config.head.shared_readout or config.model.output != "bits":
        return 0.0

    # computed once per microbatch
    tokens = (
        config.parallel.micro_batch_size * config.data.sequence_length
        or config.training.global_batch_tokens
    )
    return (
        2.0
        * make_output_distribution(config, bits).num_logits
        * config.model.backbone.hidden_size
        * config.head.hidden_size
        / tokens
    )


def generation_flops(
    config: Config, bits: int, vocab_size: int, mean_context_length: float
) -> Flops:
    """FLOPs per generated token.

    Args:
        config: the checked config.
        bits: bits per token.
        vocab_size: number of tokens.
        mean_context_length: mean number of tokens in the key-value cache.
    """
    sampling = config.sampling
    m = config.model.block_size

    # one pass through the block for each of its m tokens
    if sampling.sampler == "sequential":
        is_autoregressive = has_autoregressive_pass(config, bits)
        return _forward_flops(
            config,
            bits,
            vocab_size,
            0 if is_autoregressive else m,
            m if is_autoregressive else 0,
            mean_context_length,
        )

    # guidance needs a second pass without the condition
    return _forward_flops(
        config,
        bits,
        vocab_size,
        sampling.steps * (1 if sampling.guidance == 1 else 2),
        0,
        mean_context_length,
    )


def _forward_flops(
    config: Config,
    bits: int,
    vocab_size: int,
    num_denoiser_passes: int,
    num_autoregressive_passes: int,
    mean_context_length: float,
) -> Flops:
    """Forward FLOPs per token.

    Args:
        config: the checked config.
        bits: bits per token.
        vocab_size: number of tokens.
        num_denoiser_passes: passes of the head through a block of noisy bits.
        num_autoregressive_passes: passes of the head through a block from left to right.
        mean_context_length: mean number of positions that attention sees.
    """
    hidden_size = config.model.backbone.hidden_size
    backbone = 2.0 * _num_backbone_weights(config.model.backbone) + _attention_flops(
        config.model.backbone, mean_context_length
    )
    if config.model.output == "softmax":
        return Flops(backbone, 0.0, 2.0 * hidden_size * vocab_size, 0.0)

    head = config.head
    w = head.hidden_size
    m = config.model.block_size
    output = make_output_distribution(config, bits)

    # maps, then scores and values over the block
    layer_weights = 4 * w * w + 3 * w * (3 * w // 2) + 2 * w * m
    weights_per_pass = (
        head.num_adaln_layers * 6 * w * w + 2 * w * w + head.num_layers * layer_weights
    )

    # inputs of the head: noisy bits with their noise level, or clean bits from left to right
    noisy_in = (
        bits * w
        + TIMESTEP_EMBEDDING_DIM * w
        + w * w
        + (w * output.num_posterior_features if head.posterior_input else 0)
    )
    clean_in = bits * w + w * w if m > 1 else 0
    conditioning = hidden_size * w + (
        hidden_size * hidden_size if head.context_ahead and m > 1 else 0
    )
    passes = num_denoiser_passes * (weights_per_pass + noisy_in) + num_autoregressive_passes * (
        weights_per_pass + clean_in
    )

    logits = _logits_weights(config, output, num_denoiser_passes, num_autoregressive_passes)

    # a table of inputs is read, not multiplied
    embedding_flops = (
        0.0 if config.model.input == "table" else 2.0 * hidden_size * (bits + hidden_size)
    )
    return Flops(backbone, 2.0 * (passes + conditioning), 2.0 * logits, embedding_flops)


def _logits_weights(
    config: Config,
    output: OutputDistribution,
    num_denoiser_passes: int,
    num_autoregressive_passes: int,
) -> int:
    """Multiply-adds per token of the logits of all passes."""
    head = config.head
    w = head.hidden_size
    hidden_size = config.model.backbone.hidden_size
    weights = output.num_logits * (
        (num_denoiser_passes + num_autoregressive_passes) * w
        + (hidden_size if head.context_logits else 0)
    )

    # the table rows that one token reads, and the state they are multiplied with
    if has_conditional_groups(config, output):
        assert isinstance(output, MixtureOutput)
        weights += (
            num_autoregressive_passes
            * hidden_size
            * (w + (output.num_groups - 1) * 2**output.bits_per_group)
        )

    return weights


def _num_backbone_weights(b: BackboneConfig) -> int:
    query = b.num_heads * b.head_dim
    key_value = b.num_kv_heads * b.head_dim
    return b.num_layers * (
        b.hidden_size * (2 * query + 2 * key_value) + 3 * b.hidden_size * b.ffn_hidden_size
    )


def _attention_flops(b: BackboneConfig, mean_context_length: float) -> float:
    # scores and values, each a multiply-add per pair of positions and element
    return b.num_layers * 4.0 * mean_context_length * b.num_heads * b.head_dim
