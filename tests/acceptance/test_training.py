"""The checks that train, with runs that a test makes up."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from bitlm_dist.acceptance.commands import CheckFailedError, CheckSkippedError
from bitlm_dist.acceptance.context import Context
from bitlm_dist.acceptance.sizes import SIZES
from bitlm_dist.acceptance.training import check_fp8, check_layout, check_resume, train_recipe

SIZE = SIZES["cpu"]
NUM_STEPS, SAVED_EVERY, BEFORE_KILL = SIZE.compared_steps


class Trainer:
    """Stands for the commands: writes metrics, and a checkpoint where training is to be killed.

    Args:
        loss: the loss of a step of the run with some words.
    """

    def __init__(self, loss):
        self.loss = loss
        self.words = []
        self.num_killed = 0

    def bitlm(self, *words):
        self.words.append(words)
        self._write(words, NUM_STEPS)

    def _write(self, words, num_steps):
        run = Path(words[words.index("--run.dir") + 1])
        run.mkdir(exist_ok=True)
        records = [
            {
                "step": step,
                "loss": self.loss(words, step),
                "grad_norm": 1.0,
                "tokens_per_second": 10.0 * step,
                "device_memory_peak_bytes": None,
            }
            for step in range(1, num_steps + 1)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return run

    @contextmanager
    def started(self, command, environment):
        run = self._write(tuple(command), BEFORE_KILL)
        (run / "checkpoints" / f"step-{SAVED_EVERY:08d}").mkdir(parents=True)
        yield None
        self.num_killed += 1

    def wait(self, process, until):
        return None if until() else 0


def context(loss, tmp_path, num_cards=1):
    return Context(SIZE, {"num_cards": num_cards}, tmp_path, Trainer(loss))


def is_killed_run(words):
    return any("run-killed" in word for word in words)


def test_a_resumed_run_must_equal_the_other_one_bitwise(tmp_path):
    made = context(lambda words, step: 1.0 / step, tmp_path)
    found = check_resume(made)
    assert found["killed_at_step"] == BEFORE_KILL
    assert found["steps_equal"] == NUM_STEPS
    assert made.commands.num_killed == 1
    # the run that was killed is continued with the same words
    assert "run-killed" in " ".join(made.commands.words[-1])
    assert not list(tmp_path.iterdir())

    def differs(words, step):
        return 1.0 / step + (2**-52 if is_killed_run(words) and step == 7 else 0)

    with pytest.raises(CheckFailedError, match="first at step 7"):
        check_resume(context(differs, tmp_path))


def test_two_cards_are_compared_with_one(tmp_path):
    def off_by(relative):
        return lambda words, step: 2.0 * (1 + (relative if "local" in words else 0))

    assert check_layout(context(off_by(9e-5), tmp_path), "TP2") == {"steps_compared": NUM_STEPS}
    with pytest.raises(CheckFailedError, match=r"step 1: 2\.0004 on two cards, 2 on one"):
        check_layout(context(off_by(2e-4), tmp_path), "TP2")


def test_one_card_is_not_compared(tmp_path):
    made = Context(SIZES["gpu"], {"num_cards": 1}, tmp_path, Trainer(lambda words, step: 1.0))
    with pytest.raises(CheckSkippedError, match="one card"):
        check_layout(made, "DP2")


def test_a_loss_that_is_not_finite_fails(tmp_path):
    made = context(lambda words, step: None if step == 3 else 1.0, tmp_path)
    with pytest.raises(CheckFailedError, match="step 3"):
        train_recipe(made, "paper")


def test_speed_is_the_median_of_the_second_half(tmp_path):
    found = train_recipe(context(lambda words, step: 1.0, tmp_path), "paper")
    late = [10.0 * step for step in range(NUM_STEPS // 2 + 1, NUM_STEPS + 1)]
    assert found["tokens_per_second"] == sum(late) / len(late)
    assert found["peak_bytes"] is None


def test_fp8_is_tried_only_with_transformer_engine(tmp_path):
    made = context(lambda words, step: 1.0, tmp_path)
    made.findings = {"Transformer Engine": {"found": False, "note": "pip install"}}
    with pytest.raises(CheckSkippedError, match="pip install"):
        check_fp8(made)

    made.findings = {"Transformer Engine": {"found": True, "note": "2.6"}}
    check_fp8(made)
    words = made.commands.words[-1]
    assert words[len(words) - words[::-1].index("--training.precision")] == "fp8"
