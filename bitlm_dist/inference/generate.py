"""Text block by block: sample a block, feed its signed bits through the backbone once, repeat (paper, section 3.4)."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitlm_dist.config import SamplingConfig
from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import Source
from bitlm_dist.diffusion.sampler import Known, Sampled, guided, ode_sample, sde_sample, sequential_sample
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.chain import ChainDecoder, NoiseDecoder
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.model.softmax_lm import SoftmaxLM

Watcher = Callable[[int, Tensor], None]


def sample_block(
    model: BitLM,
    hidden: Tensor,
    sampling: SamplingConfig,
    source: Source,
    *,
    known: Known | None = None,
    settle: bool = True,
    watch: Watcher | None = None,
) -> Sampled:
    """Draw one block for each row of hidden states.

    Args:
        hidden: [N, M, D], C of the block before.
        sampling: which sampler, how many steps, guidance, temperature.
        source: of the random numbers.
        known: tokens of the block that the prompt fixes.
        settle: ``sequential`` makes each token valid before the next one sees it.
        watch: called with (pass, A0_hat [N, M, K]) after every head pass.

    Returns:
        Signed bits [N, M, K] (valid codes only if ``settle``) and the number of head passes.
    """
    head, codes = model.head, model.codes
    shape = (*hidden.shape[:2], codes.bits)

    def normal(step: int) -> Tensor:
        return source.at(step=step).normals(noise.SAMPLING, shape[1] * shape[2]).view(shape)

    def valid(bits: Tensor) -> Tensor:
        return codes.encode(codes.project(bits)) if settle else bits

    chained = sampling.sampler == "sequential" and head.chained
    start = torch.zeros(shape, device=hidden.device) if chained else normal(0)
    context, known = head.read(hidden), Known.none(start) if known is None else known
    if sampling.sampler == "sequential":
        u = source.at(step=1).uniforms(noise.SAMPLING, shape[1] * (shape[2] + 1)).view(*shape[:2], -1)
        decoder = ChainDecoder(head, context) if chained else NoiseDecoder(head, context)

        def draw(i: int, bits: Tensor) -> Tensor:
            return decoder.sample(i, bits, u[:, i], sampling.temperature)

        return sequential_sample(draw, start, settle=valid, known=known, watch=watch)
    denoisers = head.denoisers(context)
    if sampling.guidance != 1:
        denoisers = guided(denoisers, head.denoisers(head.unconditional(context)), sampling.guidance)
    start = start * sampling.temperature
    if sampling.sampler == "sde":
        sampled = sde_sample(denoisers, start, sampling.steps, lambda step: normal(2 + step), known=known, watch=watch)
    else:
        sampled = ode_sample(denoisers, start, sampling.steps, known=known, confidence=sampling.confidence, watch=watch)
    passes = sampled.head_passes * (1 if sampling.guidance == 1 else 2)
    return Sampled(valid(sampled.denoised) if settle else sampled.bits, passes, sampled.denoised)


@dataclass
class Progress:
    """Counts of a generation so far."""

    backbone_passes: int = 0
    head_passes: int = 0
    tokens: int = 0
    seconds: float = 0.0


def next_tokens(
    model: LanguageModel,
    hidden: Tensor,
    sampling: SamplingConfig,
    source: Source,
    *,
    fixed: Tensor | None = None,
    watch: Watcher | None = None,
) -> tuple[Tensor, int]:
    """Draw the block after the states ``hidden`` [N, M, D] -> token ids [N, M], head passes made.

    A softmax takes only ``sampling.temperature``.

    Args:
        fixed: the first tokens of the block [N, F], F < M, where the prompt fixes them.
        sampling, source, watch: see :func:`sample_block`.
    """
    if isinstance(model, SoftmaxLM):
        u = source.at(step=1).uniforms(noise.SAMPLING, 1)
        return model.sample(hidden[:, 0], u, sampling.temperature), 0
    assert isinstance(model, BitLM)
    known = None if fixed is None or fixed.shape[1] == 0 else _known(model, fixed)
    sampled = sample_block(model, hidden, sampling, source, known=known, watch=watch)
    return model.codes.decode(sampled.bits), sampled.head_passes


def _known(model: BitLM, fixed: Tensor) -> Known:
    count, m = fixed.shape[1], model.block_size
    filled = torch.cat((fixed, fixed[:, -1:].expand(-1, m - count)), 1)
    mask = (torch.arange(m, device=fixed.device) < count).expand(len(fixed), -1)
    return Known(model.codes.encode(filled), mask, clean_time=model.config.diffusion.per_token > 0)


@torch.inference_mode()
def generate_batch(
    model: LanguageModel,
    prompts: Tensor,
    *,
    bos: int,
    blocks: int,
    sampling: SamplingConfig,
    seed: int,
    progress: Progress | None = None,
    cached: bool = True,
    watch: Watcher | None = None,
) -> Iterator[Tensor]:
    """Whole blocks after prompts of one length, [N, M] token ids each; EOS does not stop them.

    Args:
        prompts: token ids [N, P], without BOS. The first block drawn begins with the P mod m tokens
            that fill no block.
        bos: id of the m tokens that open a document.
        blocks: how many.
        progress: filled as it goes.
        cached: keep keys and values; False runs the whole prefix through the backbone for every block (for tests).
        watch: see :func:`sample_block`.
    """
    progress = Progress() if progress is None else progress
    m = model.block_size
    complete = prompts.shape[1] // m * m
    prefix = torch.cat((prompts.new_full((len(prompts), m), bos), prompts[:, :complete]), 1)
    row = torch.arange(len(prompts), device=prompts.device)
    fresh, fixed = prefix, prompts[:, complete:]
    with model.decoding() if cached else nullcontext():
        for number in range(blocks):
            began = time.perf_counter()
            hidden = model.hidden(fresh if cached else prefix)[:, -m:]
            source = Source(seed, row, torch.full_like(row, number))
            fresh, head_passes = next_tokens(model, hidden, sampling, source, fixed=fixed, watch=watch)
            prefix, fixed = torch.cat((prefix, fresh), 1), fixed[:, :0]
            progress.backbone_passes += 1
            progress.head_passes += head_passes
            progress.seconds += time.perf_counter() - began
            yield fresh


def generate_blocks(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Iterator[list[int]]:
    """New tokens after one ``prompt``, a list for each block, until the blocks are written or EOS; see :func:`generate_batch`."""
    progress = Progress() if progress is None else progress
    device = next(model.parameters()).device
    known = len(prompt) % model.block_size
    prompts = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
    for block in generate_batch(model, prompts, progress=progress, **settings):
        began = time.perf_counter()
        new = block[0].tolist()[known:]  # waits for the device, whose time counts
        progress.seconds += time.perf_counter() - began
        known = 0
        ended = model.eos in new
        if ended:
            new = new[: new.index(model.eos)]
        progress.tokens += len(new)
        yield new
        if ended:
            return
