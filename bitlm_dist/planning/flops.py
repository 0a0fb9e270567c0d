"""Matrix-product FLOPs of training and generation, by component; 2 FLOPs per multiply-add.

Norms, softmaxes, elementwise operations and optimizers are not counted, as is usual for MFU. The
backward pass costs twice the forward pass.

Legend: m tokens per block.
"""

from dataclasses import astuple, dataclass

import torch

from bitlm_dist.config import Config
from bitlm_dist.model.config import BackboneConfig
from bitlm_dist.model.heads.build import meta_head

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


def peak_flops_of(card: str) -> float | None:
    """bf16 peak in FLOP/s of a card by its name, e.g. NVIDIA H100 80GB HBM3; None if unknown."""
    return _lookup_name(PEAK_FLOPS, card)


def _lookup_device(table: dict[str, float], device: torch.device) -> float | None:
    return (
        _lookup_name(table, torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    )


def _lookup_name(table: dict[str, float], name: str) -> float | None:
    # the first match counts, so longer names come first in the tables
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
    backbone = _backbone_flops(config.model.backbone, mean_context_length=(length + seen) / 2)
    if config.model.output == "softmax":
        forward = Flops(backbone, 0.0, _softmax_flops(config, vocab_size), 0.0)
    else:
        head = HeadFlops.of(config, bits)
        trained = config.diffusion.loss_weights(head.loss_terms)
        num_denoiser_passes = config.diffusion.num_noise_samples
        num_autoregressive_passes = int("autoregressive" in trained)

        # the product of a shared readout's two matrices is computed once per microbatch
        tokens = config.parallel.micro_batch_size * length or config.training.global_batch_tokens
        forward = Flops(
            backbone,
            head.passes(num_denoiser_passes, num_autoregressive_passes),
            head.logits(num_denoiser_passes, num_autoregressive_passes)
            + head.next_token * ("next_token" in trained)
            + head.readout_product / tokens,
            _input_flops(config, bits),
        )

    return Flops(*(part * (1 + BACKWARD_FACTOR) for part in astuple(forward)))


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
    backbone = _backbone_flops(config.model.backbone, mean_context_length)
    if config.model.output == "softmax":
        return Flops(backbone, 0.0, _softmax_flops(config, vocab_size), 0.0)

    head = HeadFlops.of(config, bits)
    passes = (0, 0)  # of the denoiser and the autoregressive pass
    if sampling.sampler == "sequential":
        # one pass through the block for each of its m tokens
        passes = (0, m) if "autoregressive" in head.loss_terms else (m, 0)
    else:
        # guidance needs a second pass without the condition
        passes = (sampling.steps * (1 if sampling.guidance == 1 else 2), 0)
    return Flops(backbone, head.passes(*passes), head.logits(*passes), _input_flops(config, bits))


@dataclass(frozen=True)
class HeadFlops:
    """Forward FLOPs per token of a head's parts, from the sizes of its weights.

    Attributes:
        loss_terms: of the head.
        conditioning: what is computed once per block, but for the logits.
        layers: the layers of one pass.
        noisy_input: input of a denoiser pass: noisy bits with their noise level.
        clean_input: input of an autoregressive pass.
        context_logits: logits that are computed once per block.
        pass_logits: correction of the logits by each pass.
        group_tables: correction of the logits by each autoregressive pass.
        next_token: logits of the next-token loss.
        readout_product: product of a shared readout's two matrices, per microbatch.
    """

    loss_terms: tuple[str, ...]
    conditioning: float
    layers: float
    noisy_input: float
    clean_input: float
    context_logits: float
    pass_logits: float
    group_tables: float
    next_token: float
    readout_product: float

    @classmethod
    def of(cls, config: Config, bits: int) -> "HeadFlops":
        """Build the config's head without memory, and read the sizes of what it has."""
        head = meta_head(config, bits)
        sizes = {n: p.numel() for n, p in head.named_parameters() if not n.endswith("bias")}

        def flops(*prefixes: str) -> float:
            """2 FLOPs per weight of the parts with these names; 0 for parts that it lacks."""
            return 2.0 * sum(size for n, size in sizes.items() if n.startswith(prefixes))

        m = config.model.block_size
        width = config.head.hidden_size
        num_logits = head.output.num_logits
        state_size = config.model.backbone.hidden_size
        attention = 2.0 * config.head.num_layers * 2 * width * m  # scores and values over the block
        lookahead = flops("lookahead.") / m  # each position has a projection of its own
        is_shared = head.get_parameter("final.weight").shape[0] == state_size != num_logits

        # the rows of the tables that a token reads, and the state they are multiplied with
        tables = flops("conditional_group_logits.")
        if tables:
            patterns = head.get_parameter("conditional_group_logits.rows").shape[1]
            tables = tables / patterns + flops("final.")
        return cls(
            loss_terms=head.loss_terms,
            conditioning=flops("context_in.") + lookahead,
            layers=flops("blocks.", "modulations.", "final_modulation.") + attention,
            noisy_input=flops("bits_in.", "time_in.", "posterior_in."),
            clean_input=flops("previous_token_in.up", "previous_token_in.down"),
            context_logits=flops("context_out."),
            pass_logits=2.0 * width * num_logits,
            group_tables=tables,
            next_token=flops("context_out.") + lookahead,
            readout_product=num_logits * flops("final.") if is_shared else 0.0,
        )

    def passes(self, num_denoiser_passes: int, num_autoregressive_passes: int) -> float:
        """FLOPs of conditioning and layers for that many passes."""
        return (
            self.conditioning
            + num_denoiser_passes * (self.layers + self.noisy_input)
            + num_autoregressive_passes * (self.layers + self.clean_input)
        )

    def logits(self, num_denoiser_passes: int, num_autoregressive_passes: int) -> float:
        """FLOPs of the logits for that many passes."""
        return (
            self.context_logits
            + (num_denoiser_passes + num_autoregressive_passes) * self.pass_logits
            + num_autoregressive_passes * self.group_tables
        )


def _softmax_flops(config: Config, vocab_size: int) -> float:
    return 2.0 * config.model.backbone.hidden_size * vocab_size


def _input_flops(config: Config, bits: int) -> float:
    # a table is read, not multiplied
    if config.model.input == "table":
        return 0.0
    hidden_size = config.model.backbone.hidden_size
    return 2.0 * hidden_size * (bits + hidden_size)


def _backbone_flops(b: BackboneConfig, mean_context_length: float) -> float:
    return 2.0 * _num_backbone_weights(b) + _attention_flops(b, mean_context_length)


def _num_backbone_weights(b: BackboneConfig) -> int:
    query = b.num_heads * b.head_dim
    key_value = b.num_kv_heads * b.head_dim
    return b.num_layers * (
        b.hidden_size * (2 * query + 2 * key_value) + 3 * b.hidden_size * b.ffn_hidden_size
    )


def _attention_flops(b: BackboneConfig, mean_context_length: float) -> float:
    # scores and values, each a multiply-add per pair of positions and element
    return b.num_layers * 4.0 * mean_context_length * b.num_heads * b.head_dim
