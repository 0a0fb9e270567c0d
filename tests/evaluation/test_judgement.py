import math

import pytest

from bitlm_dist.evaluation.judgement import judge

GOOD = {
    "bits_per_byte": 1.806,
    "chain_bits_per_byte": 1.547,
    "unigram_bits_per_byte": 2.169,
    "context_shuffle_delta_nats": 1.48,
    "invalid_code_rate": 0.0,
    "bytes_note": None,
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {},
            "1.547 bits per byte is 71 % of the unigram entropy: the model uses its context "
            "(shuffling it costs 1.48 nats per token).",
        ),
        (
            {"chain_bits_per_byte": None, "bytes_note": "folded"},
            "1.806 approximate bits per byte is 83 % of the unigram entropy: the model uses its",
        ),
        (
            {
                "bits_per_byte": 2.3,
                "chain_bits_per_byte": 2.25,
                "context_shuffle_delta_nats": 0.03,
            },
            "2.250 bits per byte is above the unigram entropy, 2.169: the model has learned noth",
        ),
        (
            {"bits_per_byte": 2.8, "chain_bits_per_byte": 2.7},
            "although the model uses its context: either it has been trained too briefly, or",
        ),
        (
            {"bits_per_byte": 2.4, "chain_bits_per_byte": 2.15},
            "2.150 bits per byte is about the unigram entropy, 2.169: the model has learned how",
        ),
        (
            {"context_shuffle_delta_nats": 0.03},
            "of the unigram entropy, but the model ignores the text before a block: another text",
        ),
        ({"context_shuffle_delta_nats": -0.01}, "costs only 0.00 nats per token."),
        ({"context_shuffle_delta_nats": None}, "has learned more than how frequent the tokens"),
        ({"invalid_code_rate": 0.034}, "3.4 % of the sampled codes name no token"),
        (
            {"bits_per_byte": 2.1},
            "Bound (2.100) and chain rule (1.547) are far apart: go by the chain rule, and sample "
            "with sampling.sampler = sequential.",
        ),
        ({"chain_bits_per_byte": 3.0}, "go by the bound, and sample with sampling.sampler = ode."),
        ({"bits_per_byte": None, "chain_bits_per_byte": None}, "no text to judge the model by"),
        ({"unigram_bits_per_byte": None}, "no text to judge the model by"),
        ({"bits_per_byte": math.nan, "chain_bits_per_byte": None}, "the model has diverged"),
    ],
)
def test_the_sentence_fits_the_numbers(change, sentence):
    assert sentence in judge({**GOOD, **change})
