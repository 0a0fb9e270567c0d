import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from bitlm_dist import cli
from bitlm_dist.__main__ import main
from bitlm_dist.checkpoint.steps import folder_of, read_health
from bitlm_dist.errors import DivergedError
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.integration


def diverge(trainer, first, last=math.inf):
    """Make loss and gradient norm NaN from step ``first`` to ``last``.

    No weight changes in these steps, as in the real engine.
    """
    plain = trainer.engine.train_step

    def step(batch, number):
        update = plain(batch, number)
        bad = first <= number + 1 <= last
        return (
            replace(
                update,
                loss=torch.tensor(math.nan),
                grad_norm=torch.tensor(math.inf),
                applied=torch.tensor(False),
            )
            if bad
            else update
        )

    trainer.engine.train_step = step


def metrics(run):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def test_twenty_steps_that_are_not_finite_end_in_one_line(tiny, tmp_path):
    trainer = Trainer(tiny("--training.steps", "60", "--checkpoint.every_steps", "3"))
    diverge(trainer, 5)
    with pytest.raises(DivergedError) as caught:
        trainer.fit()
    trainer.close()
    run = tmp_path / "run"
    message = str(caught.value)
    good = metrics(run)[3]

    assert "\n" not in message
    assert "not finite in 20 steps in a row, up to step 24;" in message
    assert f"the last finite loss is {good['loss']:.4f}, of step 4;" in message
    assert f"the newest healthy checkpoint is {folder_of(run / 'checkpoints', 3)}:" in message


def test_what_is_not_finite_is_null_with_a_flag_and_a_glitch_ends_nothing(tiny, tmp_path):
    trainer = Trainer(tiny())
    diverge(trainer, 3, 4)
    trainer.fit()
    trainer.close()
    lines = metrics(tmp_path / "run")

    assert [line.get("not_finite") for line in lines] == [
        None,
        None,
        ["loss", "grad_norm"],
        ["loss", "grad_norm"],
        None,
        None,
    ]
    assert [line["loss"] is None for line in lines] == [False, False, True, True, False, False]
    assert [math.isnan(loss) for loss in trainer.folder.losses()] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert trainer.folder.last_finite_loss() == (lines[5]["loss"], 6)


def test_a_run_whose_last_step_is_not_finite_has_not_succeeded_then_or_later(
    tiny, tmp_path, prepared
):
    words = ("--checkpoint.every_steps", "2")
    trainer = Trainer(tiny(*words))
    diverge(trainer, 5)
    with pytest.raises(
        DivergedError,
        match=r"at its end, step 6, .* is not finite; "
        r"the last finite loss is .*, of step 4; .*step-00000002",
    ):
        trainer.fit()

    trainer.close()
    root = tmp_path / "run" / "checkpoints"
    assert [read_health(folder_of(root, step)) for step in (2, 4, 6)] == [
        True,
        False,
        False,
    ]

    again = [
        str(tiny.file),
        "--run.dir",
        str(tmp_path / "run"),
        "--data.path",
        str(prepared),
        *words,
    ]
    with pytest.raises(DivergedError, match="at its end, step 6"):
        CliRunner().invoke(cli.app, ["train", *again], catch_exceptions=False)

    back = Trainer(tiny(*words, "--checkpoint.fallback", "true"))
    assert back.step == 2, "an unhealthy end is left for the newest healthy checkpoint"
    back.fit()
    back.close()


def test_weights_that_are_not_finite_at_the_end(tiny, tmp_path):
    """Loss and gradient norm of the last step are finite, but its update breaks the weights."""
    trainer = Trainer(tiny())
    plain = trainer.engine.train_step

    def step(batch, number):
        update = plain(batch, number)
        if number == 5:
            with torch.no_grad():
                next(trainer.engine.model.parameters()).view(-1)[0] = math.inf
        return update

    trainer.engine.train_step = step
    with pytest.raises(
        DivergedError,
        match="at its end, step 6, the loss, the gradient norm or a weight is not finite; the last",
    ):
        trainer.fit()

    trainer.close()
    assert read_health(folder_of(tmp_path / "run" / "checkpoints", 6)) is False


def test_the_command_says_it_in_one_line_and_exits_with_3(monkeypatch, capsys):
    def diverged(**settings):
        raise DivergedError("the loss is not finite; go on from step 3")

    monkeypatch.setattr(cli, "app", diverged)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 3
    assert capsys.readouterr().err == "bitlm: the loss is not finite; go on from step 3\n"
