"""Rough estimate of the memory that a model needs, before it is built."""

from collections.abc import Mapping

import psutil
import torch

from bitlm_dist.codes import num_bits_needed
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.model.build import build_meta_model
from bitlm_dist.model.heads.build import meta_head
from bitlm_dist.parallel import mesh

FP32_BYTES = 4
COPIES_PER_WEIGHT = 4  # weight, gradient and at most two moments
BYTES_PER_CODE = 16  # two int64 tables: token to code, and code to token

# activations that a layer saves for backward, feed-forward and attention included, in units of one
# hidden state
ACTIVATIONS_PER_LAYER = 24


def count_parameters(config: Config, vocab_size: int) -> int:
    """Count a model's parameters."""
    return sum(
        p.numel()
        for p in build_meta_model(config, vocab_size, num_bits_needed(vocab_size)).parameters()
    )


def training_bytes(config: Config, vocab_size: int) -> int:
    """Bytes of weights, gradients, optimizer state, codes and the activations of a microbatch."""
    num_tokens = config.training.global_batch_tokens
    if config.parallel.micro_batch_size:
        num_tokens = min(num_tokens, config.parallel.micro_batch_size * config.data.sequence_length)

    b = config.model.backbone
    activation_numel = num_tokens * b.num_layers * b.hidden_size * ACTIVATIONS_PER_LAYER

    if config.model.output == "softmax":
        output_numel = 3 * num_tokens * vocab_size  # logits, log-softmax, its gradient
    else:
        num_logits = meta_head(config, num_bits_needed(vocab_size)).output.num_logits
        activation_numel += (
            config.diffusion.num_noise_samples
            * num_tokens
            * config.head.num_layers
            * config.head.hidden_size
            * ACTIVATIONS_PER_LAYER
        )

        # logits exist per noise sample, and once more for the context
        output_numel = (3 * config.diffusion.num_noise_samples + 2) * num_tokens * num_logits

    weight_numel = COPIES_PER_WEIGHT * count_parameters(config, vocab_size)
    return FP32_BYTES * (
        weight_numel + activation_numel + output_numel
    ) + BYTES_PER_CODE * 2 ** num_bits_needed(vocab_size)


def generation_bytes(config: Config, vocab_size: int) -> int:
    """Bytes of weights and codes; caches and activations are small compared with them."""
    return FP32_BYTES * count_parameters(
        config, vocab_size
    ) + BYTES_PER_CODE * 2 ** num_bits_needed(vocab_size)


def check_memory(bytes_by_model: Mapping[str, int]) -> None:
    """Check that models fit into the free memory at the same time.

    Raises:
        UserError: they do not; tells the needs of each model and the free memory.
    """
    device = mesh.device()
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )

    if sum(bytes_by_model.values()) > free:
        each = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in bytes_by_model.items())
        raise UserError(
            f"the models need about {each}, and {free / 2**30:.1f} GiB are free on {device.type}: "
            "use a smaller model, training.global_batch_tokens or parallel.micro_batch_size, "
            "or compare one at a time"
        )
