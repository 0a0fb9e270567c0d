"""What an evaluation says about a model, in a sentence. Imports no torch."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from bitlm_dist.formatting import format_percent

# Within 2 % the model predicts no better than the frequencies of tokens, its first lesson.
ABOUT_EQUAL = 0.02
# Nats per token. The quickstart's model loses 1.5 without its context; of a model that has no use
# for it yet, some hundredths remain.
MIN_CONTEXT_DELTA = 0.1
# Each is mended by a projection to the nearest token, which the model did not mean.
MAX_INVALID_RATE = 0.01
# The bound of the quickstart's model is 17 % above its chain rule.
MAX_BOUND_GAP = 0.3


def best_bits_per_byte(report: Mapping[str, Any]) -> float | None:
    """Return the lower of bound and chain rule, in bits per byte; both hold for the same model.

    None: neither has a value.
    """
    # The chain rule is exact where the bound is not.
    values = [
        report[name]
        for name in ("bits_per_byte", "chain_bits_per_byte")
        if report[name] is not None
    ]
    return min(values, default=None)


def judge(report: Mapping[str, Any]) -> str:
    """Say in a sentence or two what a report means."""
    score = best_bits_per_byte(report)
    unigram = report["unigram_bits_per_byte"]
    if score is None or not unigram:
        return "There was no text to judge the model by."
    if not isfinite(score):
        return "The score is not finite: the model has diverged."
    return " ".join([_judge_score(score, unigram, report), *_judge_samples(report)])


def _judge_score(score: float, unigram: float, report: Mapping[str, Any]) -> str:
    """Compare the score with the unigram entropy, and say whether the context matters."""
    per_byte = "approximate bits per byte" if report.get("bytes_note") else "bits per byte"
    delta = report["context_shuffle_delta_nats"]
    ratio = score / unigram

    # It is early in training, or it has learned its training text by heart: either way it depends
    # on its context and is often wrong, and only the course of the scores tells which.
    if ratio > 1 + ABOUT_EQUAL and delta is not None and delta >= MIN_CONTEXT_DELTA:
        return (
            f"{score:.3f} {per_byte} is above the unigram entropy, {unigram:.3f}, although the "
            "model uses its context: either it has been trained too briefly, or it has learned its "
            "training text by heart. If the scores during training still fall, train for more "
            "steps; if they rise again, for fewer, or on more text."
        )
    if ratio > 1 + ABOUT_EQUAL:
        return (
            f"{score:.3f} {per_byte} is above the unigram entropy, {unigram:.3f}: the model has "
            "learned nothing yet that the frequencies of tokens do not say; train for more steps."
        )
    if ratio >= 1 - ABOUT_EQUAL:
        return (
            f"{score:.3f} {per_byte} is about the unigram entropy, {unigram:.3f}: the model has "
            "learned how frequent the tokens are, and little else yet."
        )

    share = f"{score:.3f} {per_byte} is {format_percent(ratio)} of the unigram entropy"
    if delta is None:
        return f"{share}: the model has learned more than how frequent the tokens are."
    if delta < MIN_CONTEXT_DELTA:
        return (
            f"{share}, but the model ignores the text before a block: "
            f"another text there costs only {max(delta, 0):.2f} nats per token."
        )
    return f"{share}: the model uses its context (shuffling it costs {delta:.2f} nats per token)."


def _judge_samples(report: Mapping[str, Any]) -> list[str]:
    """Name what is unusual about its samples and its two likelihoods."""
    remarks = []
    rate = report["invalid_code_rate"]
    if rate is not None and rate > MAX_INVALID_RATE:
        remarks.append(
            f"{format_percent(rate)} of the sampled codes name no token: "
            "it does not know all codes yet."
        )

    bound = report["bits_per_byte"]
    chain = report["chain_bits_per_byte"]
    if bound is not None and chain and abs(bound / chain - 1) > MAX_BOUND_GAP:
        better, sampler = ("bound", "ode") if bound < chain else ("chain rule", "sequential")
        remarks.append(
            f"Bound ({bound:.3f}) and chain rule ({chain:.3f}) are far apart: "
            f"go by the {better}, and sample with sampling.sampler = {sampler}."
        )
    return remarks
