"""Held-out evaluation: bits per byte, and the checks that keep the number honest.

Legend: B batch, V target blocks of a batch, M tokens per block, T predicted tokens of a batch,
S strata of the noise level, N sampled blocks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.data_prep.token_bytes import ByteLengths
from bitlm_dist.diffusion.likelihood import (
    noise_level_times,
)
from bitlm_dist.diffusion.noise import NoiseKey
from bitlm_dist.evaluation.brier import brier_scores
from bitlm_dist.evaluation.config import EvaluationConfig
from bitlm_dist.inference.config import SamplingConfig
from bitlm_dist.inference.generate import sample_block, sample_next_block
from bitlm_dist.model.batch import Batch
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.language_model import LanguageModel, Targets, TargetScores

BATCH_SIZE = 16  # sequences
SHUFFLE_EVERY = 4  # batches; the context-shuffle delta is far larger than its error
EVALUATION_SEED = 2**31  # fixed, so that two models are scored with the same noise


@dataclass(frozen=True)
class EvaluationReport:
    """Held-out quality.

    Nats are means over the predicted tokens: the tokens of documents and each document's first EOS.
    A value is None or empty if there was nothing to compute it from, e.g. no full block to sample.
    """

    tokens: int
    bytes: int
    exact: bool  # False: bits_per_byte is an upper bound
    nats_per_token: float | None
    bits_per_byte: float | None
    bits_per_byte_se: float | None  # None for fewer than two sequences
    chain_bits_per_byte: float | None
    unigram_bits_per_byte: float | None
    context_shuffle_delta_nats: float | None
    brier: list[float]  # Brier-n of the next n tokens, n = 1..min(m, 4), times 100
    invalid_code_rate: float | None
    accuracy_by_time: dict[str, float]


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    dataset: PackedDataset,
    byte_lengths: ByteLengths,
    config: EvaluationConfig,
    sampling: SamplingConfig,
    advance: Callable[[int], None] = lambda done: None,
) -> EvaluationReport:
    """Score a model on the first epoch of a dataset.

    Args:
        byte_lengths: UTF-8 bytes of each token id.
        config: amount of data, noise levels of the bound, and number of blocks to sample.
        sampling: how to sample blocks, after true context.
        advance: called with the number of sequences that are done.
    """
    device = next(model.parameters()).device
    scores: list[TargetScores] = []
    sequences: list[Tensor] = []
    ids: list[Tensor] = []
    samples = _Samples(config.num_sampled_blocks)

    # extra bytes of a token that opens a document
    first_token_extra_bytes = torch.from_numpy(byte_lengths.first - byte_lengths.inside).to(device)
    # summed on the device, because reading it per batch would wait for the GPU
    extra_bytes = torch.zeros((), dtype=torch.int64, device=device)

    batches = dataset.epoch_batches(BATCH_SIZE, config.num_sequences, device)
    for batch_index, batch in enumerate(batches):
        advance(batch_index * BATCH_SIZE)
        targets = model.targets(batch, model.hidden_states(batch.tokens, batch.document_ids))
        if not len(targets.block_index):
            continue  # only padding

        scores.append(
            model.score_targets(
                targets,
                num_noise_levels=config.num_noise_levels,
                seed=EVALUATION_SEED,
                shuffle_context=batch_index % SHUFFLE_EVERY == 0,
            )
        )
        sequence_of_token = targets.sequence_index.unsqueeze(1).expand_as(targets.valid)
        sequences.append(sequence_of_token[targets.valid])
        ids.append(targets.tokens[targets.valid])

        is_start = _is_document_start(batch, targets, dataset.manifest["bos"])
        extra_bytes = extra_bytes + (first_token_extra_bytes[targets.tokens[:, 0]] * is_start).sum()
        samples.add(model, targets, sampling)

    return _build_report(
        scores,
        _concat_on_cpu(sequences),
        _concat_on_cpu(ids),
        byte_lengths.inside,
        int(extra_bytes),
        exact=model.has_exact_likelihood,
        brier=samples.brier(),
        invalid_rate=_mean(samples.has_invalid_code),
    )


class _Samples:
    """Blocks sampled after true context, up to a total number.

    Args:
        num_blocks: how many blocks to sample over all batches.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_remaining = num_blocks
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.has_invalid_code: list[Tensor] = []

    def add(self, model: LanguageModel, targets: Targets, sampling: SamplingConfig) -> None:
        """Sample blocks of one batch; a no-op once there are enough."""
        if self._num_remaining <= 0:
            return

        if targets.valid.all(-1).any():
            self._pairs.append(_sample_twice(model, targets, self._num_remaining, sampling))
        self.has_invalid_code.append(
            _has_invalid_code(model, targets, self._num_remaining, sampling)
        )
        self._num_remaining -= len(self.has_invalid_code[-1])

    def brier(self) -> list[float]:
        """Brier scores of all samples; empty without any full block."""
        if not self._pairs:
            return []
        return brier_scores(*(torch.cat(tensors) for tensors in zip(*self._pairs, strict=True)))


def _is_document_start(batch: Batch, targets: Targets, bos: int) -> Tensor:
    """Whether each target block follows the BOS block of its document, [V] bool."""
    # sequence indices of a batch are consecutive
    blocks = batch.tokens.unflatten(1, (-1, targets.tokens.shape[1]))
    return (
        blocks[targets.sequence_index - batch.sequence_index[0], targets.block_index - 1, 0] == bos
    )


def _concat_on_cpu(batches: list[Tensor]) -> Tensor:
    """Concatenate batches on the CPU; without any, an empty int64 tensor."""
    return torch.cat(batches).cpu() if batches else torch.empty(0, dtype=torch.int64)


def _mean(batches: list[Tensor]) -> float | None:
    """Mean over all elements of all batches; None without any."""
    values = _concat_on_cpu(batches).double()
    return float(values.mean()) if values.numel() else None


def _sample_twice(
    model: LanguageModel, targets: Targets, max_blocks: int, sampling: SamplingConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample up to ``max_blocks`` blocks without EOS padding twice, after true context.

    Returns:
        The text, and the first and the second sample: token ids [N, M] each.
    """
    is_full = targets.valid.all(-1)
    rows = is_full.nonzero().squeeze(-1)[:max_blocks]
    truth = targets.tokens[rows]
    hidden = targets.context_hidden[rows]

    # Another seed makes the second sample independent.
    noise_keys = (
        NoiseKey(EVALUATION_SEED + again, targets.sequence_index[rows], targets.block_index[rows])
        for again in (0, 1)
    )
    first, second = (
        sample_next_block(model, hidden, sampling, noise_key)[0] for noise_key in noise_keys
    )
    return truth, first, second


def _has_invalid_code(
    model: LanguageModel, targets: Targets, max_blocks: int, sampling: SamplingConfig
) -> Tensor:
    """Sample up to ``max_blocks`` blocks and find the codes that name no token.

    Returns:
        Whether each token had an invalid code before the projection, [N, M] bool.
    """
    # a softmax only yields ids of tokens
    if not isinstance(model, BitLM):
        return torch.zeros_like(targets.tokens[:max_blocks], dtype=torch.bool)

    noise_key = NoiseKey(
        EVALUATION_SEED, targets.sequence_index[:max_blocks], targets.block_index[:max_blocks]
    )
    sampled = sample_block(
        model, targets.context_hidden[:max_blocks], sampling, noise_key, project_to_valid=False
    )
    return model.codes.bits_to_ids(sampled.bits) < 0


def _build_report(
    scores: list[TargetScores],
    sequence: Tensor,
    ids: Tensor,
    byte_lengths: NDArray[np.int64],
    extra_bytes: int,
    *,
    exact: bool,
    brier: list[float],
    invalid_rate: float | None,
) -> EvaluationReport:
    """Aggregate the scores of all batches.

    Args:
        sequence, ids: sequence index and id of every predicted token.
        byte_lengths: bytes of each token id inside a document.
        extra_bytes: further bytes of tokens that open a document.
    """
    token_nats = _concat_on_cpu([batch.nats for batch in scores]).double()
    deltas = [
        batch.shuffled_context_nats - batch.nats
        for batch in scores
        if batch.shuffled_context_nats is not None
    ]
    autoregressive_nats = [
        batch.autoregressive_nats for batch in scores if batch.autoregressive_nats is not None
    ]
    num_tokens = len(token_nats)
    num_bytes = int(byte_lengths[ids.numpy()].sum()) + extra_bytes

    # The unigram entropy of the evaluated text itself is the reference that uses no context.
    counts = ids.bincount().double()
    frequencies = counts[counts > 0] / num_tokens

    def per_byte(nats: float | None) -> float | None:
        """Convert nats of the full text to bits per byte."""
        return None if nats is None or not num_bytes else nats / math.log(2) / num_bytes

    return EvaluationReport(
        tokens=num_tokens,
        bytes=num_bytes,
        exact=exact,
        nats_per_token=_mean([token_nats]),
        bits_per_byte=per_byte(float(token_nats.sum())),
        bits_per_byte_se=per_byte(_clustered_standard_error(sequence, token_nats)),
        chain_bits_per_byte=per_byte(float(torch.cat(autoregressive_nats).double().sum()))
        if autoregressive_nats
        else None,
        unigram_bits_per_byte=per_byte(
            float(-(frequencies * frequencies.log()).sum()) * num_tokens
        ),
        context_shuffle_delta_nats=_mean(deltas),
        brier=brier,
        invalid_code_rate=invalid_rate,
        accuracy_by_time=_accuracy_by_time(scores),
    )


def _accuracy_by_time(scores: list[TargetScores]) -> dict[str, float]:
    """Bit accuracy at the time of each stratum, from noisy to clean.

    It is a mean over all predicted tokens, so larger batches weigh more.
    """
    accuracies = [
        (batch.bit_accuracy.double().cpu(), len(batch.nats))
        for batch in scores
        if batch.bit_accuracy is not None
    ]
    if not accuracies:
        return {}

    total = sum(tokens for _, tokens in accuracies)
    levels = (
        torch.stack([accuracy * (tokens / total) for accuracy, tokens in accuracies])
        .sum(0)
        .tolist()
    )

    return {
        f"{t:.2f}": level
        for t, level in zip(noise_level_times(len(levels)).tolist(), levels, strict=True)
    }


def _clustered_standard_error(sequence: Tensor, value: Tensor) -> float | None:
    """Standard error of the sum, where sequences are independent clusters of tokens.

    None: a single cluster has no spread.
    """
    num_sequences = len(sequence.unique())
    if num_sequences < 2:
        return None

    # Tokens of a sequence are correlated, so residuals are summed per sequence before squaring.
    residual = torch.zeros(int(sequence.max()) + 1, dtype=torch.float64).index_add(
        0, sequence, value - value.mean()
    )
    return float(residual.square().sum().sqrt()) * math.sqrt(num_sequences / (num_sequences - 1))
