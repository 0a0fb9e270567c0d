"""How much memory a model needs, roughly, before it is built."""

from collections.abc import Mapping

import psutil
import torch

from bitlm_dist.codes import bits_needed
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.model.build import meta_model
from bitlm_dist.model.head import make_output
from bitlm_dist.parallel import mesh

FP32 = 4
WEIGHT_GRADIENT_MOMENTS = 4  # copies of the weights under AdamW; Muon needs three
CODE_TABLES = 16  # bytes a code: token to code, code to token
LAYER_STATES = 24  # activations a layer keeps for backward, in units of one hidden state, feed-forward and attention included


def parameters(config: Config, vocabulary: int) -> int:
    """Count of a model's parameters."""
    return sum(p.numel() for p in meta_model(config, vocabulary, bits_needed(vocabulary)).parameters())


def training_bytes(config: Config, vocabulary: int) -> int:
    """Weights, gradients, optimizer state, codes and the activations of a microbatch."""
    tokens = config.training.global_batch_tokens
    if config.parallel.microbatch:
        tokens = min(tokens, config.parallel.microbatch * config.data.sequence_length)
    b = config.model.backbone
    states = tokens * b.layers * b.width * LAYER_STATES
    if config.model.output == "softmax":
        output = 3 * tokens * vocabulary  # logits, log-softmax, its gradient
    else:
        law = make_output(config, bits_needed(vocabulary)).size
        states += config.diffusion.draws * tokens * config.head.layers * config.head.width * LAYER_STATES
        output = (3 * config.diffusion.draws + 2) * tokens * law
    weights = WEIGHT_GRADIENT_MOMENTS * parameters(config, vocabulary)
    return FP32 * (weights + states + output) + CODE_TABLES * 2 ** bits_needed(vocabulary)


def generation_bytes(config: Config, vocabulary: int) -> int:
    """Weights and codes; caches and activations are small beside them."""
    return FP32 * parameters(config, vocabulary) + CODE_TABLES * 2 ** bits_needed(vocabulary)


def check_memory(needed: Mapping[str, int]) -> None:
    """Refuse models that do not fit together.

    Raises:
        UserError: says what each needs and what is free.
    """
    device = mesh.device()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if sum(needed.values()) > free:
        each = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in needed.items())
        raise UserError(
            f"the models need about {each}, and {free / 2**30:.1f} GiB are free on {device.type}: "
            "use a smaller model, training.global_batch_tokens or parallel.microbatch, or compare one at a time"
        )
