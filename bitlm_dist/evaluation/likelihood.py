"""What a model is worth on held-out text: bits a byte, and the checks that keep the number honest."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitlm_dist.config import EvaluationConfig, SamplingConfig
from bitlm_dist.data.feed import Feed
from bitlm_dist.data_prep.token_bytes import ByteLengths
from bitlm_dist.diffusion.likelihood import Bound, bound, chain_nats, strata_times
from bitlm_dist.diffusion.noise import Source
from bitlm_dist.evaluation.brier import brier_scores
from bitlm_dist.inference.generate import next_tokens, sample_block
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.head import Context
from bitlm_dist.model.language_model import Batch, LanguageModel, Targets
from bitlm_dist.model.softmax_lm import SoftmaxLM

BATCH = 16  # sequences
SHUFFLE_EVERY = 4  # batches; the context-shuffle delta is far larger than its error
EVALUATION_SEED = 2**31  # fixed, so that two models are scored with the same noise


@dataclass(frozen=True)
class Report:
    """Held-out quality; every nat is a mean over the predicted tokens (document tokens and each document's first EOS).

    None or an empty collection: there was nothing to compute the value from, e.g. no whole block to sample.
    """

    tokens: int
    bytes: int
    exact: bool  # False: bits_per_byte is an upper bound
    nats_per_token: float | None
    bits_per_byte: float | None
    bits_per_byte_se: float | None  # None with fewer than two sequences, which have no spread
    chain_bits_per_byte: float | None
    unigram_bits_per_byte: float | None
    context_shuffle_delta_nats: float | None
    brier: list[float]  # Brier-n of the next n tokens, n = 1..min(m, 4), times 100
    invalid_code_rate: float | None
    accuracy_by_time: dict[str, float]


@dataclass(frozen=True)
class _Scores:
    """A batch: nats of the predicted tokens [T], the same after another block's context, chain-rule nats, bit accuracy [S]."""

    nats: Tensor
    shuffled: Tensor | None = None
    chain: Tensor | None = None
    accuracy: Tensor | None = None


@torch.no_grad()
def evaluate(
    model: LanguageModel, feed: Feed, byte_lengths: ByteLengths, config: EvaluationConfig, sampling: SamplingConfig
) -> Report:
    """Score a model on the first epoch of a feed.

    Args:
        byte_lengths: UTF-8 bytes of each token id.
        config: how much to read, strata of the bound, blocks to sample after true context.
        sampling: how those are sampled.
    """
    device = next(model.parameters()).device
    score = _score_softmax if isinstance(model, SoftmaxLM) else _score_bits
    scores: list[_Scores] = []
    sequences: list[Tensor] = []
    ids: list[Tensor] = []
    drawn: list[tuple[Tensor, Tensor, Tensor]] = []
    invalid: list[Tensor] = []
    left = config.sampled_blocks
    at_start = torch.from_numpy(byte_lengths.first - byte_lengths.inside).to(device)  # what a document's first token has more
    more_bytes = torch.zeros((), dtype=torch.int64, device=device)
    for number, batch in enumerate(feed.epoch_batches(BATCH, config.sequences, device)):
        targets = model.targets(batch, model.hidden(batch.tokens, batch.document_ids))
        if not len(targets.block):
            continue  # padding alone

        scores.append(score(model, targets, config.strata, number % SHUFFLE_EVERY == 0))
        sequences.append(targets.sample.unsqueeze(1).expand_as(targets.valid)[targets.valid])
        ids.append(targets.tokens[targets.valid])
        more_bytes = more_bytes + (at_start[targets.tokens[:, 0]] * _opens(batch, targets, feed.manifest["bos"])).sum()
        if left > 0:
            if targets.valid.all(-1).any():
                drawn.append(_sample_twice(model, targets, left, sampling))
            invalid.append(_invalid(model, targets, left, sampling))
            left -= len(invalid[-1])
    return _report(
        scores,
        _joined(sequences),
        _joined(ids),
        byte_lengths.inside,
        int(more_bytes),
        exact=isinstance(model, SoftmaxLM),
        brier=brier_scores(*(torch.cat(part) for part in zip(*drawn, strict=True))) if drawn else [],
        invalid_rate=_mean(invalid),
    )


def _opens(batch: Batch, targets: Targets, bos: int) -> Tensor:
    """Whether each target block is the first of a document, after its block of BOS: [V] bool."""
    blocks = batch.tokens.unflatten(1, (-1, targets.tokens.shape[1]))
    return blocks[targets.sample - batch.sample[0], targets.block - 1, 0] == bos


def _joined(parts: list[Tensor]) -> Tensor:
    """Batches end to end, on the CPU; an empty int64 tensor where there are none."""
    return torch.cat(parts).cpu() if parts else torch.empty(0, dtype=torch.int64)


def _mean(parts: list[Tensor]) -> float | None:
    """Mean over all elements of all batches; None: there are none."""
    every = _joined(parts).double()
    return float(every.mean()) if every.numel() else None


def _source(targets: Targets) -> Source:
    return Source(EVALUATION_SEED, targets.sample, targets.block)


def _bound(model: BitLM, clean: Tensor, context: Context, targets: Targets, strata: int) -> Bound:
    return bound(model.head.denoisers(context), clean, strata=strata, source=_source(targets), valid=targets.valid)


def _score_bits(model: LanguageModel, targets: Targets, strata: int, shuffle: bool) -> _Scores:
    assert isinstance(model, BitLM)
    head, valid = model.head, targets.valid
    clean, context = model.codes.encode(targets.tokens), head.read(targets.context)
    result = _bound(model, clean, context, targets, strata)
    shuffled = chain = None
    if shuffle and len(clean) > 1:  # a block has no other context than its own to be given
        other = head.read(targets.context.roll(len(clean) // 2, 0))
        shuffled = _bound(model, clean, other, targets, strata).nats[valid]
    if head.chained:
        chain = -head.output.log_prob(head.chain(clean, context), clean)[valid]
    elif model.config.diffusion.per_token > 0 or model.block_size == 1:
        chain = chain_nats(lambda z, t: head(z, t, context), head.output, clean, _source(targets))[valid]
    return _Scores(result.nats[valid], shuffled, chain, result.accuracy)


def _score_softmax(model: LanguageModel, targets: Targets, strata: int, shuffle: bool) -> _Scores:
    assert isinstance(model, SoftmaxLM)
    hidden, tokens = targets.context[targets.valid], targets.tokens[targets.valid]
    other = model.nats(hidden.roll(len(hidden) // 2, 0), tokens) if shuffle and len(tokens) > 1 else None
    return _Scores(model.nats(hidden, tokens), other)


def _sample_twice(model: LanguageModel, targets: Targets, most: int, sampling: SamplingConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The text and two draws of up to ``most`` blocks without EOS padding, after true context: [N, M] ids each."""
    whole = targets.valid.all(-1)
    rows = whole.nonzero().squeeze(-1)[:most]
    truth, hidden = targets.tokens[rows], targets.context[rows]
    sources = (Source(EVALUATION_SEED + again, targets.sample[rows], targets.block[rows]) for again in (0, 1))
    first, second = (next_tokens(model, hidden, sampling, source)[0] for source in sources)
    return truth, first, second


def _invalid(model: LanguageModel, targets: Targets, most: int, sampling: SamplingConfig) -> Tensor:
    """Whether each token of up to ``most`` drawn blocks had a code that names no token, before projection: [N, M] bool."""
    if not isinstance(model, BitLM):
        return torch.zeros_like(targets.tokens[:most], dtype=torch.bool)
    source = Source(EVALUATION_SEED, targets.sample[:most], targets.block[:most])
    return model.codes.decode(sample_block(model, targets.context[:most], sampling, source, settle=False).bits) < 0


def _report(
    scores: list[_Scores],
    sequence: Tensor,
    ids: Tensor,
    byte_lengths: NDArray[np.int64],
    more_bytes: int,
    *,
    exact: bool,
    brier: list[float],
    invalid_rate: float | None,
) -> Report:
    value = _joined([batch.nats for batch in scores]).double()
    deltas = [batch.shuffled - batch.nats for batch in scores if batch.shuffled is not None]
    chain = [batch.chain for batch in scores if batch.chain is not None]
    tokens, size = len(value), int(byte_lengths[ids.numpy()].sum()) + more_bytes
    counts = ids.bincount().double()
    share = counts[counts > 0] / tokens

    def per_byte(nats: float | None) -> float | None:
        """Bits per byte of text, from nats of the whole text."""
        return None if nats is None or not size else nats / math.log(2) / size

    return Report(
        tokens=tokens,
        bytes=size,
        exact=exact,
        nats_per_token=_mean([value]),
        bits_per_byte=per_byte(float(value.sum())),
        bits_per_byte_se=per_byte(_cluster_error(sequence, value)),
        chain_bits_per_byte=per_byte(float(torch.cat(chain).double().sum())) if chain else None,
        unigram_bits_per_byte=per_byte(float(-(share * share.log()).sum()) * tokens),
        context_shuffle_delta_nats=_mean(deltas),
        brier=brier,
        invalid_code_rate=invalid_rate,
        accuracy_by_time=_by_time(scores),
    )


def _by_time(scores: list[_Scores]) -> dict[str, float]:
    """Bit accuracy at each stratum's time, from noisy to clean: a mean over all predicted tokens, so larger batches weigh more."""
    known = [(batch.accuracy.double().cpu(), len(batch.nats)) for batch in scores if batch.accuracy is not None]
    if not known:
        return {}
    total = sum(tokens for _, tokens in known)
    levels = torch.stack([accuracy * (tokens / total) for accuracy, tokens in known]).sum(0).tolist()
    return {f"{t:.2f}": level for t, level in zip(strata_times(len(levels)).tolist(), levels, strict=True)}


def _cluster_error(sequence: Tensor, value: Tensor) -> float | None:
    """Standard error of the sum, with sequences as independent clusters of tokens; None: one cluster has no spread."""
    count = len(sequence.unique())
    if count < 2:
        return None
    residual = torch.zeros(int(sequence.max()) + 1, dtype=torch.float64).index_add(0, sequence, value - value.mean())
    return float(residual.square().sum().sqrt()) * math.sqrt(count / (count - 1))
