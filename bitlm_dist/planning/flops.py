"""Matrix-product FLOPs of a training step and of written text, by component; 2 FLOPs a multiply-add.

Norms, softmaxes, elementwise work and optimizers are not counted, as is usual for MFU. Backward passes cost twice the forward one.

Legend: w head width, m tokens a block.
"""

from dataclasses import dataclass

import torch

from bitlm_dist.config import BackboneConfig, Config
from bitlm_dist.diffusion.outputs import MixtureOutput
from bitlm_dist.model.head import TIME_FEATURES, has_tables, is_chained, make_output

BACKWARD = 2  # times the forward pass
# Dense bf16 peak, FLOP/s, from the vendor's data sheets; matched against the device's name.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}
# Of memory, byte/s, from the same sheets.
BANDWIDTHS = {
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
    """FLOPs a token by component; their sum is the model's."""

    backbone: float
    head: float  # what runs for every draw or denoising pass
    output: float  # the vocabulary, or what turns head states and context into the output law
    input: float

    @property
    def total(self) -> float:
        """All components."""
        return self.backbone + self.head + self.output + self.input


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of a CUDA device, FLOP/s; None where it is not known (a CPU, another card)."""
    return _of_card(PEAKS, device)


def peak_bandwidth(device: torch.device) -> float | None:
    """Peak of a CUDA device's memory, byte/s; None where it is not known."""
    return _of_card(BANDWIDTHS, device)


def _of_card(table: dict[str, float], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in table.items() if all(word in name for word in card.split())), None)


def training_flops(config: Config, bits: int, vocabulary: int) -> Flops:
    """FLOPs of a training step, forward and backward, a token of the sequence."""
    m, length, diffusion = config.model.block_size, config.data.sequence_length, config.diffusion
    seen = m if config.model.attention == "block" else 1
    chained = is_chained(config, bits)
    forward = _forward(config, bits, vocabulary, diffusion.draws, int(chained), keys=(length + seen) / 2)
    output = forward.output
    if diffusion.next_token and m > 1 and config.model.output == "bits":
        width = config.model.backbone.width
        output += 2.0 * width * (make_output(config, bits).size + (width if config.head.context_ahead else 0))
    if config.head.shared_readout and config.model.output == "bits":  # the product of its two matrices, once a microbatch
        tokens = config.parallel.microbatch * length or config.training.global_batch_tokens
        output += 2.0 * make_output(config, bits).size * config.model.backbone.width * config.head.width / tokens
    return Flops(*(part * (1 + BACKWARD) for part in (forward.backbone, forward.head, output, forward.input)))


def generation_flops(config: Config, bits: int, vocabulary: int, keys: float) -> Flops:
    """FLOPs a written token with ``keys`` cached tokens on average."""
    sampling, m = config.sampling, config.model.block_size
    if sampling.sampler == "sequential":
        chained = is_chained(config, bits)
        return _forward(config, bits, vocabulary, 0 if chained else m, m if chained else 0, keys)
    return _forward(config, bits, vocabulary, sampling.steps * (1 if sampling.guidance == 1 else 2), 0, keys)


def _forward(config: Config, bits: int, vocabulary: int, denoised: int, chained: int, keys: float) -> Flops:
    """One forward pass of the backbone, ``denoised`` of the head and ``chained`` left to right through the block."""
    width = config.model.backbone.width
    backbone = 2.0 * _backbone_weights(config.model.backbone) + _attention(config.model.backbone, keys)
    if config.model.output == "softmax":
        return Flops(backbone, 0.0, 2.0 * width * vocabulary, 0.0)
    head, w, m = config.head, config.head.width, config.model.block_size
    output = make_output(config, bits)
    block = 4 * w * w + 3 * w * (3 * w // 2) + 2 * w * m  # maps, then scores and values over the block
    each = head.modulations * 6 * w * w + 2 * w * w + head.layers * block
    noisy_in = bits * w + TIME_FEATURES * w + w * w + (w * output.evidence_size if head.posterior_input else 0)
    clean_in = bits * w + w * w if m > 1 else 0
    context = width * w + (width * width if head.context_ahead and m > 1 else 0)
    law = output.size * ((denoised + chained) * w + (width if head.context_logits else 0))
    if has_tables(config, output):  # the rows that one token reads, and the state they are multiplied with
        assert isinstance(output, MixtureOutput)
        law += chained * width * (w + (output.groups - 1) * 2**output.group)
    read = 0.0 if config.model.input == "table" else 2.0 * width * (bits + width)
    passes = denoised * (each + noisy_in) + chained * (each + clean_in)
    return Flops(backbone, 2.0 * (passes + context), 2.0 * law, read)


def _backbone_weights(b: BackboneConfig) -> int:
    query, key_value = b.heads * b.head_width, b.kv_heads * b.head_width
    return b.layers * (b.width * (2 * query + 2 * key_value) + 3 * b.width * b.ffn_width)


def _attention(b: BackboneConfig, keys: float) -> float:
    return b.layers * 4.0 * keys * b.heads * b.head_width
