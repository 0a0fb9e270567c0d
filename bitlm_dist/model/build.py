"""Build the model that a config describes."""

import os
from typing import TypeVar

import torch
from torch import nn

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.compilation import should_compile
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.kernels.attention import disable_backend
from bitlm_dist.kernels.attention_inputs import validate_inputs
from bitlm_dist.kernels.self_check import select_verified_backend, verify_in_block_kernels
from bitlm_dist.model.backbone import DTYPES
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.heads.build import num_head_weights
from bitlm_dist.model.initialization import draw_weights
from bitlm_dist.model.language_model import LanguageModel, PipelineStage
from bitlm_dist.model.softmax_lm import SoftmaxLM
from bitlm_dist.model.transformer_engine import check_fp8, without_fp8
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.device import set_cuda_environment
from bitlm_dist.parallel.layout import ParallelLayout, local_model_chunks, split_layers


def build_model(
    config: Config,
    codes: BitCodes,
    eos: int,
    pipeline_stage: PipelineStage | None = None,
    initialize: bool = True,
) -> LanguageModel:
    """Build the model that ``model.output`` selects.

    Args:
        config: a validated config.
        codes: codes of the vocabulary; a softmax uses only its size.
        eos: id of the token that ends a document.
        pipeline_stage: the part of the model to build; None: the full model.
        initialize: draw the initial weights. False leaves them unset, as a checkpoint follows.
    """
    model: LanguageModel = (
        SoftmaxLM(config, codes.vocab_size, eos, pipeline_stage)
        if config.model.output == "softmax"
        else BitLM(config, codes, eos, pipeline_stage)
    )
    cast_weights(model, config)

    if initialize:
        stage = model.pipeline_stage
        draw_weights(
            model,
            config.training.seed,
            stage.model_chunk.layer_range.start,
            stage.layout.tensor_rank,
            stage.layout.tensor,
        )
    return model


def prepare_device(config: Config) -> str:
    """Set up this process's device and verify the attention kernels on it.

    Returns:
        The name of the attention backend that trains this config on this machine.

    Raises:
        UserError: the configured backend is unavailable or cannot train this config, or the
            compiler or, with fp8, Transformer Engine is missing.
    """
    set_cuda_environment(config, os.environ)  # must precede the first CUDA call
    b = config.model.backbone
    device = mesh.set_current_device()
    if config.training.precision == "fp8":
        check_fp8(device)
    torch.set_float32_matmul_precision(config.training.float32_matmul_precision)
    if config.training.deterministic and device.type == "cuda":
        _enable_determinism(config)
    should_compile(config.training.compile, device)

    # Only shapes, dtype and device of these inputs matter for the choice of the backend.
    block_size = config.model.block_size if config.model.attention == "block" else 1
    shapes = (
        (1, heads, block_size, b.head_dim)
        for heads in (b.num_heads, b.num_kv_heads, b.num_kv_heads)
    )
    dtype = DTYPES[config.training.precision]
    q, k, v = (
        torch.empty(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes
    )
    try:
        name = select_verified_backend(validate_inputs(q, k, v, block_size), b.attention)
    except ValueError as error:
        raise UserError(f"model.backbone.attention = {b.attention}: {error}") from None

    head = config.head
    qkv_shape = (
        1,
        config.model.block_size,
        3,
        head.num_heads,
        head.hidden_size // head.num_heads,
    )
    verify_in_block_kernels(torch.empty(qkv_shape, dtype=q.dtype, device=device))
    return name


def _enable_determinism(config: Config) -> None:
    """Restrict training to deterministic kernels.

    flash-attn 4 accumulates the gradient of the queries in the order in which its tiles finish.
    """
    if config.model.backbone.attention == "fa4":
        raise UserError(
            "training.deterministic = true: model.backbone.attention = fa4 is not deterministic: "
            "use auto or triton"
        )
    disable_backend("fa4", "training.deterministic = true, and its gradient is not deterministic")

    torch.use_deterministic_algorithms(True, warn_only=True)
    # filling costs time, and no code here reads memory that it has not written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


Model = TypeVar("Model", bound=nn.Module)


def cast_weights(model: Model, config: Config) -> Model:
    """Cast the weights in place to the dtype of ``training.precision``; buffers stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[config.training.precision])
    return model


def build_model_chunks(
    config: Config, codes: BitCodes, eos: int, layout: ParallelLayout, initialize: bool = True
) -> list[LanguageModel]:
    """Build the model chunks that this rank of the layout holds, on its device."""
    layer_counts = layers_per_stage(config, codes)
    with mesh.device():
        return [
            build_model(
                config, codes, eos, PipelineStage(layout, model_chunk, layer_counts), initialize
            ).to(mesh.device())
            for model_chunk in local_model_chunks(layer_counts, layout)
        ]


def layers_per_stage(config: Config, codes: BitCodes) -> list[int]:
    """Count the layers of each pipeline stage.

    As configured, else balanced so that the last stage's head work is accounted for. The cost of
    layers and head is the number of weights that each token passes through.
    """
    parallel = config.parallel
    b = config.model.backbone
    if parallel.layers_per_stage is not None:
        return list(parallel.layers_per_stage)

    layer_cost = b.hidden_size * (
        2 * b.head_dim * (b.num_heads + b.num_kv_heads) + 3 * b.ffn_hidden_size
    )

    if config.model.output == "softmax":
        head_cost = b.hidden_size * codes.vocab_size
    else:
        # The head runs once per noise sample, and once more for the autoregressive pass.
        head_cost = num_head_weights(config, codes.num_bits) * (
            config.diffusion.num_noise_samples + bool(config.diffusion.autoregressive_loss_weight)
        )

    return split_layers(
        b.num_layers, parallel.pipeline * parallel.virtual_pipeline, head_cost / layer_cost
    )


def build_meta_model(config: Config, vocab_size: int, num_bits: int) -> LanguageModel:
    """Build the model on the meta device, which allocates no memory whatever the model's size."""
    with torch.device("meta"):
        codes = BitCodes(natural_codes(vocab_size), num_bits)
        return build_model(without_fp8(config), codes, eos=0, initialize=False)
