"""Report values that cannot be computed, and means over batches of unequal size."""

import json
from dataclasses import asdict, replace
from typing import ClassVar

import pytest
import torch

from bitlm_dist.cli.evaluate import _print_report
from bitlm_dist.data_prep.token_bytes import ByteLengths
from bitlm_dist.errors import UserError
from bitlm_dist.evaluation.compare import markdown_table, table_rows
from bitlm_dist.evaluation.compare_plot import choose_axis, plot
from bitlm_dist.evaluation.config import EvaluationConfig
from bitlm_dist.evaluation.judgement import best_bits_per_byte, judge
from bitlm_dist.evaluation.likelihood import evaluate
from bitlm_dist.evaluation.run_records import load_record
from bitlm_dist.formatting import format_value, ratio_or_none
from bitlm_dist.inference.config import SamplingConfig
from bitlm_dist.model.batch import Batch

BOS = 0
EOS = 1
LENGTH = 16
BLOCK = 4
STRATA = 3
PADDING = [-1] * LENGTH


class Sequences:
    """A dataset of hand-written sequences, in batches of given sizes."""

    def __init__(self, rows, sizes):
        self.tokens, self.ids = (torch.tensor(part) for part in zip(*rows, strict=True))
        self.sizes = sizes

    manifest: ClassVar = {"bos": BOS}

    def epoch_batches(self, count, limit, device):
        first = 0
        for size in self.sizes:
            rows = slice(first, first + size)
            yield Batch(self.tokens[rows], self.ids[rows], torch.arange(first, first + size))
            first += size


def sequence(*texts):
    """Pack documents of up to ``LENGTH`` tokens: their tokens and document ids."""
    tokens = []
    ids = []

    for number, text in enumerate(texts):
        size = (len(text) // BLOCK + 2) * BLOCK
        tokens += [BOS] * BLOCK + text + [EOS] * (size - BLOCK - len(text))
        ids += [number] * size

    return tokens + [EOS] * (LENGTH - len(tokens)), ids + [-1] * (LENGTH - len(ids))


def score(model, rows, sizes=None, byte_length=1):
    sizes_of_tokens = torch.full((300,), byte_length).numpy()
    sizes_of_tokens[[BOS, EOS]] = 0
    lengths = ByteLengths(sizes_of_tokens, sizes_of_tokens)
    settings = EvaluationConfig(num_noise_levels=STRATA, num_sampled_blocks=8)
    return evaluate(
        model, Sequences(rows, sizes or [len(rows)]), lengths, settings, SamplingConfig()
    )


@pytest.fixture(params=["bits", "softmax"])
def model(request, tiny, tiny_model):
    from bitlm_dist.codes import BitCodes, natural_codes
    from bitlm_dist.model.build import build_model

    if request.param == "softmax":
        return build_model(
            tiny("--model.output", "softmax"), BitCodes(natural_codes(300), 9), eos=EOS
        ).eval()

    return tiny_model().eval()


def test_padding_alone_has_no_value_at_all(model):
    report = score(model, [([EOS] * LENGTH, PADDING)] * 3)
    assert (report.tokens, report.bytes) == (0, 0)

    values = asdict(report)
    for name in ("tokens", "bytes", "exact", "brier", "accuracy_by_time"):
        del values[name]

    assert set(values.values()) == {None}
    assert (report.brier, report.accuracy_by_time) == ([], {})

    _print_report("nothing", asdict(report))
    assert judge(asdict(report)) == "There was no text to judge the model by."


def test_one_short_document_has_a_likelihood_but_no_spread_no_whole_block_and_no_other_context(
    tiny_model,
):
    report = score(tiny_model().eval(), [sequence([7, 8])])
    assert (report.tokens, report.bytes) == (3, 2)
    assert report.bits_per_byte > 0
    assert report.bits_per_byte_se is None
    assert report.context_shuffle_delta_nats is None
    assert report.brier == []
    assert 0 <= report.invalid_code_rate <= 1, "tokens of a block that is not whole are drawn too"

    _print_report("a document", asdict(report))


def test_documents_shorter_than_a_block_are_scored(tiny_model):
    report = score(tiny_model().eval(), [sequence([7, 8], [9]), sequence([7])])
    assert (report.tokens, report.brier) == (7, [])
    assert report.bits_per_byte_se > 0
    assert report.context_shuffle_delta_nats is not None


def test_predicted_tokens_without_text_have_no_bits_per_byte(model):
    report = score(model, [sequence([]), sequence([7])], byte_length=0)
    assert report.nats_per_token > 0
    assert (report.bytes, report.bits_per_byte, report.unigram_bits_per_byte) == (0, None, None)


def test_no_mean_depends_on_how_sequences_are_cut_into_batches(tiny_model, seed):
    """One of four sequences has three quarters of the tokens."""
    rows = [
        sequence([5]),
        sequence([6]),
        sequence([7]),
        sequence(torch.randint(2, 300, (11,)).tolist()),
    ]
    model = tiny_model().eval()
    whole, cut = (asdict(score(model, rows, sizes)) for sizes in ([4], [3, 1]))

    for report in (
        whole,
        cut,
    ):  # computed from every fourth batch; the draws are as many as batches allow
        del report["context_shuffle_delta_nats"], report["invalid_code_rate"]

    assert cut.pop("accuracy_by_time") == pytest.approx(whole.pop("accuracy_by_time"))
    assert cut.pop("brier") == pytest.approx(whole.pop("brier"))
    assert cut == pytest.approx(whole)


def test_a_ratio_to_nothing_is_none():
    assert ratio_or_none(1.0, 0.0) is ratio_or_none(None, 1.0) is ratio_or_none(1.0, None) is None
    assert ratio_or_none(3.0, 2.0) == 1.5
    assert (format_value(None), format_value(1.25, "{:.1f}")) == ("–", "1.2")


def test_runs_without_a_value_are_compared_with_dashes(tiny, tmp_path):
    """Covers the table, its Markdown and the plot; a kill has truncated the last line."""
    from bitlm_dist.config_loading import to_yaml

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(tiny()))
    (folder / "environment.json").write_text('{"command": ["bitlm", "train"]}')
    names = (
        "nats_per_token",
        "bits_per_byte",
        "bits_per_byte_se",
        "chain_bits_per_byte",
        "context_shuffle_delta_nats",
    )
    report = {**dict.fromkeys(names), "exact": False, "brier": []}
    lines = [
        {
            "step": step,
            "tokens": 64 * step,
            "seconds": 1.0,
            "cpu_seconds": 1.0,
            "validation": {**report, "bits_per_byte": value},
        }
        for step, value in ((1, 2.5), (2, None))
    ]
    (folder / "evaluations.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "val'
    )
    record = load_record(folder)

    assert [best_bits_per_byte(entry["validation"]) for entry in record.evaluations] == [2.5, None]

    (row,) = table_rows([record])
    assert "<= – ± –" in row
    assert "| – |" in markdown_table([record])
    assert choose_axis([record], None) == "tokens", (
        "as it was written by a version that did not count predicted tokens"
    )
    with pytest.raises(
        UserError,
        match="--axis text_bytes: .*run was trained by a version that did not count it: use tokens",
    ):
        choose_axis([record], "text_bytes")

    counted = replace(
        record, evaluations=[{**entry, "predicted_tokens": 30} for entry in record.evaluations]
    )

    assert choose_axis([counted], None) == "predicted_tokens"
    assert choose_axis([counted, record], None) == "tokens"

    plot([record], "tokens", tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").is_file()
