"""The model that a config names."""

import os
from typing import TypeVar

import torch
from torch import nn

from bitlm_dist.codes import BitCodes, natural
from bitlm_dist.compilation import compiles
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.kernels.attention import distrust
from bitlm_dist.kernels.call import checked
from bitlm_dist.kernels.trial import prove_in_block, proven
from bitlm_dist.model.backbone import DTYPES
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.head import head_weights
from bitlm_dist.model.language_model import LanguageModel, Place
from bitlm_dist.model.softmax_lm import SoftmaxLM
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.device import set_cuda_environment
from bitlm_dist.parallel.layout import Layout, split_layers, stages_of


def build_model(config: Config, codes: BitCodes, eos: int, place: Place | None = None) -> LanguageModel:
    """``model.output`` decides.

    Args:
        config: checked.
        codes: of the vocabulary; a softmax reads only its size.
        eos: id that ends a document.
        place: which part of the model; None: all of it.
    """
    if config.model.output == "softmax":
        return rounded(SoftmaxLM(config, codes.vocabulary, eos, place), config)
    return rounded(BitLM(config, codes, eos, place), config)


def check_machine(config: Config) -> str:
    """Name of the attention back end that trains this config here, after a small trial on this machine.

    Raises:
        UserError: the config asks for one that is not here or cannot train it, or for a compiler that is missing.
    """
    set_cuda_environment(config, os.environ)  # before the first call of CUDA
    b, device = config.model.backbone, mesh.use_device()
    if config.training.deterministic and device.type == "cuda":
        _repeat_bit_by_bit(config)
    compiles(config.training.compile, device)
    block = config.model.block_size if config.model.attention == "block" else 1
    shapes = ((1, heads, block, b.head_width) for heads in (b.heads, b.kv_heads, b.kv_heads))
    q, k, v = (torch.empty(shape, dtype=DTYPES[config.training.precision], device=device, requires_grad=True) for shape in shapes)
    try:
        name = proven(checked(q, k, v, block), b.attention)
    except ValueError as error:
        raise UserError(f"model.backbone.attention = {b.attention}: {error}") from None
    head, m = config.head, config.model.block_size
    prove_in_block(torch.empty(1, m, 3, head.heads, head.width // head.heads, dtype=q.dtype, device=device))
    return name


def _repeat_bit_by_bit(config: Config) -> None:
    """``training.deterministic``: flash-attn 4 sums the gradient of queries in the order in which its tiles happen to end."""
    if config.model.backbone.attention == "fa4":
        raise UserError("training.deterministic = true: model.backbone.attention = fa4 does not repeat: use auto or triton")
    distrust("fa4", "training.deterministic = true, and its gradient does not repeat")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it did not write


Model = TypeVar("Model", bound=nn.Module)


def rounded(model: Model, config: Config) -> Model:
    """The model with weights in the dtype of ``training.precision``; its buffers stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[config.training.precision])
    return model


def build_chunks(config: Config, codes: BitCodes, eos: int, layout: Layout) -> list[LanguageModel]:
    """The stages that a process of the layout holds."""
    layers = layers_per_stage(config, codes)
    return [build_model(config, codes, eos, Place(layout, stage, layers)) for stage in stages_of(layers, layout)]


def layers_per_stage(config: Config, codes: BitCodes) -> list[int]:
    """As the config says, or so that the last stage has room for the head: its weights count with every pass."""
    parallel, b = config.parallel, config.model.backbone
    if parallel.layers_per_stage is not None:
        return list(parallel.layers_per_stage)
    layer = b.width * (2 * b.head_width * (b.heads + b.kv_heads) + 3 * b.ffn_width)
    if config.model.output == "softmax":
        last = b.width * codes.vocabulary
    else:
        last = head_weights(config, codes.bits) * (config.diffusion.draws + bool(config.diffusion.chain))
    return split_layers(b.layers, parallel.pipeline * parallel.virtual_pipeline, last / layer)


def meta_model(config: Config, vocabulary: int, bits: int) -> LanguageModel:
    """The model on the meta device: shapes without memory, whatever its size."""
    with torch.device("meta"):
        return build_model(config, BitCodes(natural(vocabulary), bits), eos=0)
