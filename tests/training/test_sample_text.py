"""Texts that the model writes during training, and that training does not notice."""

import json
from contextlib import nullcontext

import pytest
from runs import losses

from bitlm_dist.data.shards import DocumentShards
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.training import sample_text
from bitlm_dist.training.sample_text import SampleText
from bitlm_dist.training.trainer import Trainer

BOS, EOS = 1, 2
WORDS = ("--evaluation.every_steps", "3")


def train(config, **settings):
    trainer = Trainer.build(config).open()
    trainer.fit(evaluate=lambda model: {}, **settings)
    trainer.close()


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_prompts_are_the_beginnings_of_documents():
    sequence = [9, 9, EOS, BOS, BOS, 5, 6, EOS, EOS, BOS, BOS, *range(10, 40)]
    assert sample_text._document_beginnings(sequence, BOS, EOS) == [[5, 6], [*range(10, 26)]]


def test_prompts_of_data_without_held_out_documents_are_empty(tiny, corpus, tmp_path):
    from bitlm_dist.data_prep.prepare import prepare

    prepare([corpus], "bpe:300", tmp_path / "data", validation_fraction=0)
    words = ("--data.path", str(tmp_path / "data"), "--evaluation.num_samples", "2")
    assert SampleText(tiny(*words))._prompts == [[], []]


@pytest.mark.integration
def test_samples_are_written_and_shown_and_change_no_loss(tiny, tmp_path, prepared):
    class Display:
        shown = ()
        phases = ()

        def phase(self, name):
            self.phases += (name,)
            return nullcontext()

        def show_evaluation(self, step, report, samples):
            self.shown += ((step, len(samples)),)

    display = Display()
    train(tiny(*WORDS, "--evaluation.num_samples", "2"), display=display)
    train(tiny(*WORDS, "--run.dir", str(tmp_path / "without")))
    assert losses(tmp_path / "run") == losses(tmp_path / "without")
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    assert display.shown == ((3, 2), (6, 2))
    assert display.phases == ("evaluating", "evaluating", "saving")

    first, second = lines(tmp_path / "run" / "samples.jsonl")
    assert (first["step"], second["step"]) == (3, 6)
    assert len(first["samples"]) == 2
    assert all(sample["text"] for line in (first, second) for sample in line["samples"])
    assert [s["prompt"] for s in first["samples"]] == [s["prompt"] for s in second["samples"]]

    # each prompt is what a held-out document begins with
    tokenizer = Tokenizer.from_folder(prepared / "tokenizer")
    with DocumentShards(prepared, "validation") as shards:
        documents = [
            tokenizer.decode(shards.tokens(i).tolist()) for i in range(len(shards.document_lengths))
        ]
    for sample in first["samples"]:
        assert sample["prompt"]
        assert any(document.startswith(sample["prompt"]) for document in documents)


@pytest.mark.integration
def test_texts_that_cannot_be_written_are_a_failed_evaluation(tiny, tmp_path, monkeypatch, capsys):
    def fail(self, model):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(SampleText, "write", fail)
    train(tiny(*WORDS, "--evaluation.num_samples", "1"))
    assert "the evaluation of step 3 failed on rank 0: RuntimeError: out of mem" in (
        capsys.readouterr().err
    )
    assert len(losses(tmp_path / "run")) == 6
