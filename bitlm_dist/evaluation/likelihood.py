"""What a model is worth on held-out text: the bound in bits a byte, and the checks that keep it honest."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitlm_dist.config import SamplingConfig
from bitlm_dist.data.feed import Feed
from bitlm_dist.diffusion.likelihood import Bound, bound, chain_nats, strata_times
from bitlm_dist.diffusion.noise import Source
from bitlm_dist.inference.generate import sample_block
from bitlm_dist.model.bitlm import BitLM, Targets
from bitlm_dist.model.head import Context

BATCH = 16  # sequences
SHUFFLE_EVERY = 4  # batches; the context-shuffle delta is far larger than its error
EVALUATION_SEED = 2**31  # fixed, so that two models are scored with the same noise


@dataclass(frozen=True)
class Report:
    """Held-out quality; every nat is a mean over the predicted tokens (document tokens and each document's first EOS)."""

    tokens: int
    bytes: int
    nats_per_token: float
    bits_per_byte: float
    bits_per_byte_se: float
    chain_bits_per_byte: float | None
    unigram_bits_per_byte: float
    context_shuffle_delta_nats: float
    invalid_code_rate: float
    accuracy_by_time: dict[str, float]


@torch.no_grad()
def evaluate(
    model: BitLM,
    feed: Feed,
    byte_lengths: NDArray[np.int64],
    *,
    strata: int,
    sequences: int = 0,
    sampled_blocks: int = 0,
    sampling: SamplingConfig | None = None,
) -> Report:
    """Score a model on the first epoch of a feed.

    Args:
        byte_lengths: UTF-8 bytes of each token id, [V].
        strata: head passes of the bound for every block.
        sequences: at most so many (0: all).
        sampled_blocks: blocks drawn with ``sampling`` after true context, for the rate of invalid codes.
    """
    device = next(model.parameters()).device
    head, per_token = model.head, model.noise_law.per_token > 0 or model.block_size == 1
    nats: list[tuple[Tensor, Tensor]] = []  # (sequence, nats of its tokens) of each batch
    deltas, chain, ids, accuracy = [], [], [], []
    sampled = invalid = 0
    for number, batch in enumerate(feed.epoch_batches(BATCH, sequences, device)):
        targets = model.targets(batch, model.hidden(batch.tokens, batch.document_ids))
        clean, context = model.codes.encode(targets.tokens), head.read(targets.context)
        result = _bound(model, clean, context, targets, strata)
        nats.append((targets.sample.unsqueeze(1).expand_as(targets.valid)[targets.valid], result.nats[targets.valid]))
        accuracy.append(result.accuracy)
        ids.append(targets.tokens[targets.valid])
        if number % SHUFFLE_EVERY == 0:
            other = head.read(targets.context.roll(len(clean) // 2, 0))
            deltas.append((_bound(model, clean, other, targets, strata).nats - result.nats)[targets.valid])
        if per_token:
            parts = chain_nats(lambda z, t: head(z, t, context), head.output, clean, _source(targets))  # noqa: B023
            chain.append(parts[targets.valid])
        if sampling and sampled < sampled_blocks:
            blocks, bad = _sample(model, targets, sampled_blocks - sampled, sampling)
            sampled, invalid = sampled + blocks, invalid + bad
    return _report(nats, deltas, chain, torch.cat(ids), accuracy, byte_lengths, invalid / max(1, sampled * model.block_size))


def _source(targets: Targets) -> Source:
    return Source(EVALUATION_SEED, targets.sample, targets.block)


def _bound(model: BitLM, clean: Tensor, context: Context, targets: Targets, strata: int) -> Bound:
    def denoise(noisy: Tensor, t: Tensor) -> Tensor:
        return model.head.denoise(noisy, t, context)

    return bound(denoise, clean, strata=strata, source=_source(targets), valid=targets.valid)


def _sample(model: BitLM, targets: Targets, most: int, sampling: SamplingConfig) -> tuple[int, int]:
    """Draw up to ``most`` blocks after true context -> (blocks drawn, tokens whose code names no token)."""
    source = Source(EVALUATION_SEED, targets.sample[:most], targets.block[:most])
    bits = sample_block(model, targets.context[:most], sampling, source, settle=False).bits
    return len(bits), int((model.codes.decode(bits) < 0).sum())


def _report(
    nats: list[tuple[Tensor, Tensor]],
    deltas: list[Tensor],
    chain: list[Tensor],
    ids: Tensor,
    accuracy: list[Tensor],
    byte_lengths: NDArray[np.int64],
    invalid_rate: float,
) -> Report:
    sequence, value = (torch.cat(parts).double().cpu() for parts in zip(*nats, strict=True))
    tokens, size = len(value), int(byte_lengths[ids.cpu().numpy()].sum())
    bits_per_byte = 1 / math.log(2) / size  # of one nat of the whole text
    counts = ids.bincount().double()
    share = counts[counts > 0] / tokens
    levels = torch.stack(accuracy).mean(0).flip(0)  # from noisy to clean
    times = strata_times(len(levels)).tolist()
    return Report(
        tokens=tokens,
        bytes=size,
        nats_per_token=float(value.mean()),
        bits_per_byte=float(value.sum()) * bits_per_byte,
        bits_per_byte_se=_cluster_error(sequence.long(), value) * bits_per_byte,
        chain_bits_per_byte=float(torch.cat(chain).double().sum()) * bits_per_byte if chain else None,
        unigram_bits_per_byte=float(-(share * share.log()).sum()) * tokens * bits_per_byte,
        context_shuffle_delta_nats=float(torch.cat(deltas).double().mean()),
        invalid_code_rate=invalid_rate,
        accuracy_by_time={f"{t:.2f}": float(a) for t, a in zip(times, levels.flip(0).tolist(), strict=True)},
    )


def _cluster_error(sequence: Tensor, value: Tensor) -> float:
    """Standard error of the sum, with sequences as independent clusters of tokens."""
    residual = torch.zeros(int(sequence.max()) + 1, dtype=torch.float64).index_add(0, sequence, value - value.mean())
    count = len(sequence.unique())
    return float(residual.square().sum().sqrt()) * math.sqrt(count / max(1, count - 1))
