import math

import numpy as np
import pytest
import torch

from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.data.shards import DocumentShards
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.evaluation.config import EvaluationConfig
from bitlm_dist.evaluation.likelihood import _clustered_standard_error, evaluate
from bitlm_dist.inference.config import SamplingConfig

pytestmark = pytest.mark.integration

STRATA = 12


@pytest.fixture
def feed(prepared):
    feed = PackedDataset(prepared, "validation", block_size=4, sequence_length=32)
    yield feed
    feed.close()


def byte_lengths(folder):
    return Tokenizer.from_folder(folder / "tokenizer").byte_lengths


def score(model, feed, folder):
    return evaluate(
        model,
        feed,
        byte_lengths(folder),
        EvaluationConfig(num_noise_levels=STRATA, num_sampled_blocks=64),
        SamplingConfig(),
    )


def test_a_model_that_knows_nothing_costs_b_ln_2_and_the_counts_are_the_corpus(
    tiny, feed, prepared
):
    """Zero context logits and a zero head give the channel posterior; counts match the files."""
    from bitlm_dist.codes import BitCodes, natural_codes
    from bitlm_dist.model.build import build_model

    model = build_model(tiny(), BitCodes(natural_codes(300), 9), eos=1)
    torch.nn.init.zeros_(model.head.context_out.weight)
    torch.nn.init.zeros_(model.head.context_out.bias)
    report = score(model, feed, prepared)
    with DocumentShards(prepared, "validation") as shards:
        documents = [shards.tokens(i) for i in range(len(shards.document_lengths))]
    text = np.concatenate(documents)

    assert report.tokens == len(text) + len(documents), "every token, and one EOS per document"
    assert (
        report.bytes
        == byte_lengths(prepared).inside[text].sum()
        == feed.manifest["splits"]["validation"]["bytes"]
    )

    per_byte = report.tokens / report.bytes / math.log(2)
    assert abs(report.bits_per_byte - 9 * math.log(2) * per_byte) < 4 * report.bits_per_byte_se
    assert report.chain_bits_per_byte == pytest.approx(9 * math.log(2) * per_byte, rel=1e-5)

    counts = np.bincount(np.concatenate([text, np.full(len(documents), 1)]))
    share = counts[counts > 0] / report.tokens

    assert report.unigram_bits_per_byte == pytest.approx(-(share * np.log(share)).sum() * per_byte)
    assert report.context_shuffle_delta_nats == pytest.approx(0, abs=1e-6)
    assert report.nats_per_token * per_byte == pytest.approx(report.bits_per_byte)


def test_context_that_matters_shows_in_the_shuffle_delta(tiny, prepared, feed):
    from bitlm_dist.training.trainer import Trainer

    trainer = Trainer.build(tiny("--training.steps", "150")).open()
    trainer.fit()
    trainer.close()
    report = score(trainer.engine.model.eval(), feed, prepared)

    assert report.context_shuffle_delta_nats > 0.2
    assert report.bits_per_byte < report.unigram_bits_per_byte
    assert 0 <= report.invalid_code_rate < 0.5

    levels = list(report.accuracy_by_time.values())
    assert len(levels) == STRATA
    assert report.brier[0] > 5, "one token in twenty would be chance"
    assert len(report.brier) == 4
    assert levels[-1] > 0.999 > levels[0], "t falls from noisy to clean"


def test_a_softmax_is_scored_exactly(tiny, prepared):
    """Compare with the fp64 cross-entropy of each document alone: no packing, no chunks."""
    from bitlm_dist.codes import BitCodes, natural_codes
    from bitlm_dist.model.build import build_model

    model = build_model(
        tiny("--model.output", "softmax"), BitCodes(natural_codes(300), 9), eos=1
    ).eval()
    # one sequence holds all documents
    feed = PackedDataset(prepared, "validation", block_size=1, sequence_length=8192)
    report = score(model, feed, prepared)
    feed.close()
    total = 0.0
    count = 0

    with DocumentShards(prepared, "validation") as shards, torch.no_grad():
        for i in range(len(shards.document_lengths)):
            text = torch.from_numpy(
                np.concatenate([[feed.manifest["bos"]], shards.tokens(i).astype(np.int64), [1]])
            ).unsqueeze(0)
            logits = model.hidden_states(text[:, :-1]).double() @ model.output.rows[:300].double().T
            total += torch.nn.functional.cross_entropy(
                logits[0], text[0, 1:], reduction="sum"
            ).item()
            count += text.shape[1] - 1

    assert (report.tokens, report.exact, report.chain_bits_per_byte, report.accuracy_by_time) == (
        count,
        True,
        None,
        {},
    )
    assert report.nats_per_token == pytest.approx(total / count, rel=1e-5)
    assert len(report.brier) == 1


def test_cluster_error_is_the_spread_of_sums_over_sequences(seed):
    sequence = torch.arange(200).repeat_interleave(10)
    shared = torch.randn(200, dtype=torch.float64).repeat_interleave(10)

    # tokens of a sequence are equal, so the sum of all 2,000 has the deviation of 200 independent
    # values, times 10
    assert _clustered_standard_error(sequence, shared) == pytest.approx(
        10 * math.sqrt(200), rel=0.2
    )
