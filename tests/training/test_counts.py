"""Positions, predicted tokens, bytes and epochs that a run counts, against its batches."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bitlm_dist.checkpoint.steps import folder_of, read_train_state
from bitlm_dist.cli import app
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.training.train_state import TrainState
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
STEPS = 4
COUNTS = ("tokens", "predicted_tokens", "text_bytes", "epochs")


def predicted_ids(tokens, ids, block, eos):
    """The tokens of one sequence that carry loss, block by block."""
    found = []
    for start in range(block, len(tokens), block):
        if ids[start] >= 0 and ids[start] == ids[start - block]:
            inside = tokens[start : start + block]
            end = inside.index(eos) + 1 if eos in inside else block
            found += inside[:end]
    return found


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def counts(run):
    return [[line[name] for name in COUNTS] for line in lines(run)]


@pytest.mark.parametrize(
    "words", [(), ("--model.output", "softmax", "--model.block_size", "1")], ids=["bits", "softmax"]
)
def test_counts_are_those_of_the_batches(words, tiny, tmp_path, prepared):
    config = tiny("--training.steps", str(STEPS), *words)
    trainer = Trainer.build(config).open()
    trainer.fit()
    trainer.close()
    byte_lengths = np.load(prepared / "statistics.npz")["byte_lengths"]
    feed = PackedDataset.from_config(config, "train", config.data.shuffle)
    predicted = text = 0
    for step, line in enumerate(lines(tmp_path / "run")):
        batch = feed.batch(step * trainer.sequences_per_step, trainer.sequences_per_step, CPU)
        for row in zip(batch.tokens.tolist(), batch.document_ids.tolist(), strict=True):
            found = predicted_ids(*row, config.model.block_size, feed.manifest["eos"])
            predicted, text = predicted + len(found), text + int(byte_lengths[found].sum())
        assert (line["predicted_tokens"], line["text_bytes"], line["tokens"]) == (
            predicted,
            text,
            256 * (step + 1),
        )
        assert line["epochs"] == pytest.approx((step + 1) * trainer.sequences_per_step / len(feed))
        assert line["predicted_tokens_per_second"] < line["tokens_per_second"]
    feed.close()


@pytest.mark.parametrize("block", [1, 4, 16])
def test_an_epoch_predicts_every_token_and_one_eos_a_document_whatever_the_block_size(
    block, prepared
):
    feed = PackedDataset(prepared, "train", block_size=block, sequence_length=64)
    split = feed.manifest["splits"]["train"]
    batch = feed.batch(0, len(feed), CPU)
    rows = zip(batch.tokens.tolist(), batch.document_ids.tolist(), strict=True)
    counted = sum(len(predicted_ids(*row, block, feed.manifest["eos"])) for row in rows)
    feed.close()
    assert counted == feed.num_predicted_tokens == split["tokens"] + split["documents"]
    assert feed.predicted_fraction(1) == counted / batch.tokens.numel()
    said = f"{len(feed):,} sequences per epoch: {batch.tokens.numel():,} positions, "
    said += f"of which {counted:,} are predicted tokens"
    assert f"{said} ({split['bytes']:,} bytes of text);" in feed.summary()


def test_a_run_goes_on_counting_where_it_stopped_and_says_its_epochs(tiny, tmp_path, prepared):
    whole = Trainer.build(tiny("--run.dir", str(tmp_path / "whole"))).open()
    whole.fit()
    whole.close()
    first = Trainer.build(tiny()).open()
    first.fit(until=3)
    first.close()
    words = [
        "train",
        str(tiny.file),
        "--run.dir",
        str(tmp_path / "run"),
        "--data.path",
        str(prepared),
    ]
    output = CliRunner().invoke(app, words, catch_exceptions=False).output
    assert f"6 steps: {48 / len(whole.dataset):.3g} epochs of data\n" in output
    assert "of them predicted" in output
    assert counts(tmp_path / "run") == counts(tmp_path / "whole")


@pytest.mark.slow
def test_a_checkpoint_that_did_not_count_goes_on_without(tiny, tmp_path):
    first = Trainer.build(tiny()).open()
    first.fit(until=3)
    first.close()
    folder = folder_of(tmp_path / "run" / "checkpoints", 3)
    state = read_train_state(folder)
    assert 0 < state["predicted_tokens"] <= state["text_bytes"] + 3 * 64
    again = Trainer.build(tiny()).open()
    old = {key: value for key, value in state.items() if key not in COUNTS[1:3]}
    again.state = TrainState.from_checkpoint(old)
    again.fit()
    again.close()
    assert counts(tmp_path / "run")[-1][:3] == [6 * 256, None, None]
