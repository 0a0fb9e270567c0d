"""Block-by-block text generation (paper, section 3.4).

Sample a block, run its signed bits through the backbone once, repeat.

Legend: N sequences, M tokens per block, K bits, D hidden size, P tokens per prompt, F fixed tokens.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import NoiseKey
from bitlm_dist.diffusion.sampler import (
    PromptTokens,
    SampledBlock,
    classifier_free_guidance,
    ode_sample,
    sde_sample,
    sequential_sample,
)
from bitlm_dist.inference.config import SamplingConfig
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.heads.base import Conditioning
from bitlm_dist.model.heads.bitlm import BitLMConditioning, BitLMHead
from bitlm_dist.model.in_block_decoding import AutoregressiveDecoder, DenoisingDecoder
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.model.softmax_lm import SoftmaxLM

StepCallback = Callable[[int, Tensor], None]


def sample_block(
    model: BitLM,
    hidden: Tensor,
    sampling: SamplingConfig,
    noise_key: NoiseKey,
    *,
    prompt_tokens: PromptTokens | None = None,
    project_to_valid: bool = True,
    callback: StepCallback | None = None,
) -> SampledBlock:
    """Sample one block for each row of hidden states.

    Args:
        hidden: C [N, M, D] of the block before.
        sampling: sampler, number of steps, guidance and temperature.
        noise_key: key of the random numbers.
        prompt_tokens: tokens of the block that the prompt fixes.
        project_to_valid: project invalid codes to valid ones; the sequential sampler does so for
            each token before the next one sees it.
        callback: called with (pass, A0_hat [N, M, K]) after every head pass.

    Returns:
        The block; all its codes are valid if ``project_to_valid``.
    """
    conditioning = model.head.condition(hidden)
    prompt_tokens = PromptTokens.empty(hidden) if prompt_tokens is None else prompt_tokens

    def to_valid_codes(bits: Tensor) -> Tensor:
        """Project each code to the nearest valid one, if asked for."""
        codes = model.codes
        return codes.ids_to_bits(codes.nearest_ids(bits)) if project_to_valid else bits

    if sampling.sampler == "sequential":
        return _sample_left_to_right(
            model,
            conditioning,
            sampling,
            noise_key,
            to_valid_codes=to_valid_codes,
            prompt_tokens=prompt_tokens,
            callback=callback,
        )

    sampled = _denoise_block(
        model, conditioning, sampling, noise_key, prompt_tokens=prompt_tokens, callback=callback
    )
    return SampledBlock(
        to_valid_codes(sampled.denoised) if project_to_valid else sampled.bits,
        # guidance runs the head twice per step, with and without context
        sampled.head_passes * (1 if sampling.guidance == 1 else 2),
        sampled.denoised,
    )


def _block_shape(model: BitLM, conditioning: Conditioning) -> tuple[int, int, int]:
    """(N, M, K) of the blocks to sample."""
    num_blocks, num_tokens = conditioning.hidden_states.shape[:2]
    return num_blocks, num_tokens, model.codes.num_bits


def _normal(noise_key: NoiseKey, shape: tuple[int, int, int], step: int) -> Tensor:
    """Standard normal numbers of ``shape`` (N, M, K) for one step."""
    return (
        noise_key.replace(step=step).normal(noise.SAMPLING_STREAM, shape[1] * shape[2]).view(shape)
    )


def _sample_left_to_right(
    model: BitLM,
    conditioning: Conditioning,
    sampling: SamplingConfig,
    noise_key: NoiseKey,
    *,
    to_valid_codes: Callable[[Tensor], Tensor],
    prompt_tokens: PromptTokens,
    callback: StepCallback | None,
) -> SampledBlock:
    """Run the sequential sampler, on the autoregressive pass if the head has one."""
    head = model.head
    shape = _block_shape(model, conditioning)
    num_blocks, num_tokens, num_bits = shape

    decoder: AutoregressiveDecoder | DenoisingDecoder
    if isinstance(head, BitLMHead) and "autoregressive" in head.loss_terms:
        assert isinstance(conditioning, BitLMConditioning)
        # this pass reads no noise
        start = torch.zeros(shape, device=conditioning.hidden_states.device)
        decoder = AutoregressiveDecoder(head, conditioning)
    else:
        start = _normal(noise_key, shape, 0)
        decoder = DenoisingDecoder(head, conditioning)

    # One number per bit, and one more for the mixture component.
    u = (
        noise_key.replace(step=1)
        .uniform(noise.SAMPLING_STREAM, num_tokens * (num_bits + 1))
        .view(num_blocks, num_tokens, -1)
    )

    def sample_token(i: int, bits: Tensor) -> Tensor:
        """Sample the bits [N, K] of token i."""
        return decoder.sample_token(i, bits, u[:, i], sampling.temperature)

    return sequential_sample(
        sample_token,
        start,
        project_to_valid=to_valid_codes,
        prompt_tokens=prompt_tokens,
        callback=callback,
    )


def _denoise_block(
    model: BitLM,
    conditioning: Conditioning,
    sampling: SamplingConfig,
    noise_key: NoiseKey,
    *,
    prompt_tokens: PromptTokens,
    callback: StepCallback | None,
) -> SampledBlock:
    """Run the ODE or the SDE sampler, with guidance if the config asks for it."""
    head = model.head
    denoisers = head.denoisers(conditioning)
    if sampling.guidance != 1:
        denoisers = classifier_free_guidance(
            denoisers, head.denoisers(head.unconditional(conditioning)), sampling.guidance
        )

    shape = _block_shape(model, conditioning)
    start = _normal(noise_key, shape, 0) * sampling.temperature
    if sampling.sampler == "sde":
        return sde_sample(
            denoisers,
            start,
            sampling.steps,
            lambda step: _normal(noise_key, shape, 2 + step),
            prompt_tokens=prompt_tokens,
            callback=callback,
        )
    return ode_sample(
        denoisers,
        start,
        sampling.steps,
        prompt_tokens=prompt_tokens,
        confidence=sampling.confidence,
        callback=callback,
    )


@dataclass
class GenerationStats:
    """Running totals of a generation."""

    backbone_passes: int = 0
    head_passes: int = 0
    tokens: int = 0
    seconds: float = 0.0


def sample_next_block(
    model: LanguageModel,
    hidden: Tensor,
    sampling: SamplingConfig,
    noise_key: NoiseKey,
    *,
    fixed_tokens: Tensor | None = None,
    callback: StepCallback | None = None,
) -> tuple[Tensor, int]:
    """Sample the block after the given states.

    For a softmax, only ``sampling.temperature`` matters.

    Args:
        hidden: [N, M, D].
        sampling, noise_key, callback: see :func:`sample_block`.
        fixed_tokens: the first tokens of the block [N, F], F < M, if the prompt fixes them.

    Returns:
        Token ids [N, M] and the number of head passes.
    """
    if isinstance(model, SoftmaxLM):
        u = noise_key.replace(step=1).uniform(noise.SAMPLING_STREAM, 1)
        return model.sample_tokens(hidden[:, 0], u, sampling.temperature), 0

    assert isinstance(model, BitLM)
    prompt_tokens = (
        None
        if fixed_tokens is None or fixed_tokens.shape[1] == 0
        else _prompt_tokens(model, fixed_tokens)
    )

    sampled = sample_block(
        model, hidden, sampling, noise_key, prompt_tokens=prompt_tokens, callback=callback
    )
    return model.codes.bits_to_ids(sampled.bits), sampled.head_passes


def _prompt_tokens(model: BitLM, fixed_tokens: Tensor) -> PromptTokens:
    """Fix the first tokens of a block to ``fixed_tokens`` [N, F]."""
    num_fixed = fixed_tokens.shape[1]
    m = model.block_size

    # The mask hides the filling, so any token serves.
    filled = torch.cat((fixed_tokens, fixed_tokens[:, -1:].expand(-1, m - num_fixed)), 1)
    mask = (torch.arange(m, device=fixed_tokens.device) < num_fixed).expand(len(fixed_tokens), -1)
    return PromptTokens(
        model.codes.ids_to_bits(filled),
        mask,
        has_per_token_time=model.config.diffusion.per_token_noise_prob > 0,
    )


@torch.inference_mode()
def generate_batch(
    model: LanguageModel,
    prompts: Tensor,
    *,
    bos: int,
    num_blocks: int,
    sampling: SamplingConfig,
    seed: int,
    stats: GenerationStats | None = None,
    use_cache: bool = True,
    callback: StepCallback | None = None,
) -> Iterator[Tensor]:
    """Yield full blocks of token ids [N, M] after prompts of equal length; EOS does not stop them.

    Args:
        prompts: token ids [N, P], without BOS. The first sampled block begins with the P mod m
            tokens that do not fill a block.
        bos: id of the m tokens that open a document.
        num_blocks: number of blocks to sample.
        stats: updated in place.
        use_cache: cache keys and values; False runs the full prefix through the backbone for every
            block (for tests).
        callback: see :func:`sample_block`.
    """
    stats = GenerationStats() if stats is None else stats
    m = model.block_size

    # Each document opens with a block of BOS, which conditions its first block.
    num_whole_block_tokens = prompts.shape[1] // m * m
    prefix = torch.cat(
        (prompts.new_full((len(prompts), m), bos), prompts[:, :num_whole_block_tokens]), 1
    )
    sequence_index = torch.arange(len(prompts), device=prompts.device)
    new_tokens = prefix
    fixed_tokens = prompts[:, num_whole_block_tokens:]

    with model.decoding() if use_cache else nullcontext():
        for block_index in range(num_blocks):
            start_time = time.perf_counter()
            hidden = model.hidden_states(new_tokens if use_cache else prefix)[:, -m:]
            noise_key = NoiseKey(seed, sequence_index, torch.full_like(sequence_index, block_index))
            new_tokens, head_passes = sample_next_block(
                model, hidden, sampling, noise_key, fixed_tokens=fixed_tokens, callback=callback
            )
            prefix = torch.cat((prefix, new_tokens), 1)
            fixed_tokens = fixed_tokens[:, :0]  # only the first block has any

            stats.backbone_passes += 1
            stats.head_passes += head_passes
            stats.seconds += time.perf_counter() - start_time
            yield new_tokens


def generate_blocks(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    stats: GenerationStats | None = None,
    **settings: Any,
) -> Iterator[list[int]]:
    """Yield the new tokens after one prompt, one list per block, up to ``num_blocks`` or EOS.

    Args:
        prompt: token ids, without BOS.
        stats: updated in place.
        settings: passed to :func:`generate_batch`.
    """
    stats = GenerationStats() if stats is None else stats
    device = next(model.parameters()).device
    num_fixed = len(prompt) % model.block_size
    prompts = torch.tensor([list(prompt)], dtype=torch.int64, device=device)

    for block in generate_batch(model, prompts, stats=stats, **settings):
        start_time = time.perf_counter()
        new_tokens = block[0].tolist()[num_fixed:]  # synchronizes with the device, so it is timed
        stats.seconds += time.perf_counter() - start_time
        num_fixed = 0

        ended = model.eos in new_tokens
        if ended:
            new_tokens = new_tokens[: new_tokens.index(model.eos)]
        stats.tokens += len(new_tokens)
        yield new_tokens
        if ended:
            return
