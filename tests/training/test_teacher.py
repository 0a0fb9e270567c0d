from dataclasses import replace

import pytest
import torch

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.errors import UserError
from bitlm_dist.model.batch import Batch
from bitlm_dist.model.build import build_model
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.training.teacher import Teacher
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.integration

SOFTMAX = ("--model.output", "softmax", "--training.steps", "4")


@pytest.fixture
def trained(tiny, tmp_path):
    """Train a short run by name, with overrides; returns its folder."""

    def make(name, *overrides):
        trainer = Trainer.build(tiny("--run.dir", str(tmp_path / name), *overrides)).open()
        trainer.fit()
        trainer.close()
        return tmp_path / name

    return make


def test_draws_follow_what_the_teacher_says_after_the_text_before(tiny, seed):
    model = build_model(tiny(*SOFTMAX), BitCodes(natural_codes(300), 9), eos=1)
    torch.nn.init.normal_(model.output.rows, std=0.5)
    batch = Batch(
        torch.randint(2, 300, (3, 32)), torch.zeros(3, 32, dtype=torch.int64), torch.arange(5, 8)
    )
    teacher = Teacher(model, 50, seed)
    steps = 200
    drawn = torch.cat([teacher.annotate(batch, step).teacher_tokens for step in range(steps)])

    for row, place in ((0, 1), (1, 17), (2, 31)):
        law = (
            model.hidden_states(batch.tokens)[row, place - 1].double()
            @ model.output.rows[:300].double().T
        ).softmax(-1)
        share = drawn[:, row, place].bincount(minlength=300) / (50 * steps)
        torch.testing.assert_close(
            share.double(), law, rtol=0, atol=6 * (0.25 / (50 * steps)) ** 0.5
        )

    alone = teacher.annotate(batch.select(slice(1, 3)), 7).teacher_tokens
    assert torch.equal(alone, teacher.annotate(batch, 7).teacher_tokens[:, 1:]), (
        "any microbatch sees the same draws"
    )


def test_context_and_chain_learn_the_drawn_tokens_after_the_text(tiny_model, seed):
    """Against one pass per position, in which that token alone is replaced by the teacher's."""
    model = tiny_model("--distillation.weight", "0.3", "--diffusion.next_token_loss_weight", "0.5")
    tokens = torch.randint(2, 300, (2, 32))
    ids = torch.zeros(2, 32, dtype=torch.int64)
    batch = Batch(tokens, ids, torch.arange(2))
    drawn = torch.randint(2, 300, (3, 2, 32))
    hidden = model.hidden_states(tokens)
    targets = model.targets(batch, hidden)
    conditioning = model.head.condition(targets.context_hidden)
    law = model.head.output.log_prob

    def learnt(block_tokens, text, place):
        bits = model.codes.ids_to_bits(block_tokens)
        text_bits = model.codes.ids_to_bits(text)
        both = law(model.head.autoregress(bits, conditioning), bits)
        both = both + law(conditioning.context_logits, bits)
        after = model.head.next_token_logits(hidden[:, 3:-1])  # of all tokens after the first block
        return both[:, place].sum() + (0.5 * law(after, text_bits).sum() if place == 0 else 0)

    expected = 0.3 * sum(learnt(targets.tokens, tokens[:, 4:], place) for place in range(4))
    for other in drawn:
        blocks = other.unflatten(-1, (-1, 4))[:, 1:].flatten(0, 1)
        for place in range(4):
            changed = targets.tokens.clone()
            changed[:, place] = blocks[:, place]
            expected = expected - 0.3 / 3 * learnt(changed, other[:, 4:], place)

    got = model.loss(replace(batch, teacher_tokens=drawn), seed=0, step=0) - model.loss(
        batch, seed=0, step=0
    )
    torch.testing.assert_close(got, expected / 9, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", ["1", "4"])
def test_a_pupil_is_another_model_and_resumes_bitwise(block, tiny, trained, tmp_path):
    words = (
        "--model.block_size",
        block,
        "--parallel.micro_batch_size",
        "3",
        "--training.global_batch_tokens",
        "192",
    )
    words += ("--distillation.teacher", str(trained("teacher", *SOFTMAX)))
    whole = Trainer.build(tiny(*words, "--run.dir", str(tmp_path / "whole"))).open()
    half = Trainer.build(tiny(*words)).open()
    whole.fit(until=4)
    half.fit(until=2)
    half.close()

    resumed = Trainer.build(tiny(*words)).open()
    resumed.fit(until=4)
    alone = Trainer.build(tiny(*words[:-2], "--run.dir", str(tmp_path / "alone"))).open()
    alone.fit(until=4)

    weights = [t.engine.model.head.final.weight for t in (whole, resumed, alone)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    for trainer in (whole, resumed, alone):
        trainer.close()


def test_teachers_that_cannot_teach_are_refused(tiny, trained, tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        Trainer.build(tiny("--distillation.teacher", str(tmp_path / "none"))).open()

    bits = trained("bits", "--training.steps", "1")
    with pytest.raises(UserError, match="was trained with model.output = bits: name a run"):
        Trainer.build(tiny("--distillation.teacher", str(bits))).open()

    softmax = str(trained("softmax", *SOFTMAX))
    with pytest.raises(UserError, match="was trained with another tokenizer than data.path has"):
        Teacher.from_config(tiny("--distillation.teacher", softmax), "another", ParallelLayout())
    with pytest.raises(
        UserError, match="needs the whole model in one process: use parallel.data alone"
    ):
        Teacher.from_config(
            tiny("--distillation.teacher", softmax), "any", ParallelLayout(pipeline=2)
        )

    for words in (SOFTMAX[:2], ("--preset", "paper")):
        message = (
            "a loss that sees no noise: diffusion.context_loss_weight, autoregressive_loss_weight"
        )
        with pytest.raises(UserError, match=f"needs model.output = bits and {message}"):
            tiny("--distillation.teacher", softmax, *words)

    assert not (tmp_path / "run").exists()
