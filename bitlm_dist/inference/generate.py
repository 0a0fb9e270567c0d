"""Text block by block: sample a block, feed its signed bits through the backbone once, repeat (paper, section 3.4)."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from bitlm_dist.config import SamplingConfig
from bitlm_dist.diffusion import noise
from bitlm_dist.diffusion.noise import Source
from bitlm_dist.diffusion.sampler import Known, Sampled, guided, ode_sample, sde_sample, sequential_sample
from bitlm_dist.model.bitlm import BitLM

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

    start, context = normal(0), head.read(hidden)
    known = Known.none(start) if known is None else known
    if sampling.sampler == "sequential":
        u = source.at(step=1).uniforms(noise.SAMPLING, shape[1] * (shape[2] + 1)).view(*shape[:2], -1)
        return sequential_sample(
            lambda noisy, t: head(noisy, t, context),
            head.output,
            start,
            u,
            temperature=sampling.temperature,
            settle=valid,
            known=known,
            watch=watch,
        )
    null = head.unconditional(context)
    denoise = guided(
        lambda noisy, t: head.denoise(noisy, t, context),
        lambda noisy, t: head.denoise(noisy, t, null),
        sampling.guidance,
    )
    start = start * sampling.temperature
    if sampling.sampler == "sde":
        sampled = sde_sample(denoise, start, sampling.steps, lambda step: normal(2 + step), known=known, watch=watch)
    else:
        sampled = ode_sample(denoise, start, sampling.steps, known=known, confidence=sampling.confidence, watch=watch)
    passes = sampled.head_passes * (1 if sampling.guidance == 1 else 2)
    return Sampled(valid(sampled.denoised) if settle else sampled.bits, passes, sampled.denoised)


@dataclass
class Progress:
    """Counts of a generation so far."""

    backbone_passes: int = 0
    head_passes: int = 0
    tokens: int = 0
    seconds: float = 0.0


@torch.no_grad()
def generate_blocks(
    model: BitLM,
    prompt: Sequence[int],
    *,
    bos: int,
    blocks: int,
    sampling: SamplingConfig,
    seed: int,
    progress: Progress | None = None,
    cached: bool = True,
    watch: Watcher | None = None,
) -> Iterator[list[int]]:
    """New tokens after ``prompt``, a list for each block, until ``blocks`` blocks or EOS.

    A prompt whose length is no multiple of m leaves a block open: its tokens are fixed in the first block drawn.

    Args:
        prompt: token ids, without BOS.
        bos: id of the m tokens that open a document.
        progress: filled as it goes.
        cached: keep keys and values; False runs the whole prefix through the backbone for every block (for tests).
        watch: see :func:`sample_block`.
    """
    progress = Progress() if progress is None else progress
    m, device = model.block_size, next(model.parameters()).device
    complete = len(prompt) // m * m
    prefix = torch.tensor([[bos] * m + list(prompt[:complete])], device=device)
    fixed = list(prompt[complete:])
    fresh = prefix
    with model.backbone.decoding() if cached else nullcontext():
        for number in range(blocks):
            began = time.perf_counter()
            hidden = model.hidden(fresh if cached else prefix)[:, -m:]
            progress.backbone_passes += 1
            sampled = sample_block(
                model,
                hidden,
                sampling,
                Source(seed, torch.zeros_like(prefix[:, 0]), torch.full_like(prefix[:, 0], number)),
                known=_known(model, fixed, device),
                watch=watch,
            )
            fresh = model.codes.decode(sampled.bits)
            prefix = torch.cat((prefix, fresh), 1)
            new = fresh[0].tolist()[len(fixed) :]
            fixed = []
            ended = model.eos in new
            if ended:
                new = new[: new.index(model.eos)]
            progress.head_passes += sampled.head_passes
            progress.tokens += len(new)
            progress.seconds += time.perf_counter() - began
            yield new
            if ended:
                return


def _known(model: BitLM, fixed: Sequence[int], device: torch.device) -> Known | None:
    if not fixed:
        return None
    m = model.block_size
    ids = torch.tensor([list(fixed) + [fixed[-1]] * (m - len(fixed))], device=device)
    mask = (torch.arange(m, device=device) < len(fixed)).unsqueeze(0)
    return Known(model.codes.encode(ids), mask, clean_time=model.noise_law.per_token > 0)
