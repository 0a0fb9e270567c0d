"""Healthy, unhealthy and damaged checkpoints: which one a run resumes from."""

import json
from dataclasses import replace

import pytest
import torch
from runs import losses

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint.steps import complete_steps, folder_of, read_health
from bitlm_dist.errors import UserError
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.integration


def poison(trainer, *bad):
    """Have the engine report a gradient norm of NaN for some steps."""
    plain = trainer.engine.train_step

    def step(batch, number):
        update = plain(batch, number)
        return (
            replace(update, grad_norm=torch.tensor(float("nan")), applied=torch.tensor(False))
            if number + 1 in bad
            else update
        )

    trainer.engine.train_step = step


def test_a_checkpoint_is_healthy_if_its_step_and_the_next_were(tiny, tmp_path):
    words = ("--training.steps", "12", "--checkpoint.every_steps", "2", "--checkpoint.keep", "1")
    trainer = Trainer(tiny(*words))
    poison(trainer, 5, 6, 8)
    root = tmp_path / "run" / "checkpoints"
    seen = {}

    def look(metrics):
        seen[metrics["step"]] = {s: read_health(folder_of(root, s)) for s in complete_steps(root)}

    trainer.fit(until=9, observe=look)
    assert seen[3] in ({2: True}, {}), "proven by step 3, if it was written by then"
    assert complete_steps(root) == [2, 8, 9], (
        "4, 6 and 8 were bad: 2 is the newest healthy one, 8 tells what happened"
    )
    assert read_health(folder_of(root, 8)) is False
    assert read_health(folder_of(root, 9)) is None
    trainer.close()

    again = Trainer(tiny(*words))
    assert again.step == 9

    again.fit()
    again.close()
    assert complete_steps(root) == [10, 12], "9 was proven by step 10 of the resumed run, 10 by 11"


def harm(folder):
    file = folder / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def test_a_damaged_checkpoint_is_refused_or_loudly_left_for_the_one_before(tiny, tmp_path, capsys):
    words = ("--checkpoint.every_steps", "2")
    trainer = Trainer(tiny(*words))
    trainer.fit(until=5)
    trainer.close()

    root = tmp_path / "run" / "checkpoints"
    harm(folder_of(root, 5))
    message = "rank-00000.safetensors is damaged: remove .* or set checkpoint.fallback"
    with pytest.raises(UserError, match=f"step-00000005/{message}"):
        Trainer(tiny(*words))

    again = Trainer(tiny(*words, "--checkpoint.fallback", "true"))
    assert again.step == 4

    said = capsys.readouterr().err
    assert "CHECKPOINT DAMAGED" in said
    assert "damaged-step-00000005; going on from an older one" in said

    again.fit()
    again.close()

    whole = Trainer(tiny(*words, "--run.dir", str(tmp_path / "whole")))
    whole.fit()
    whole.close()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")

    # a checkpoint without its manifest is damaged, too: taken for none, the run would begin anew
    (folder_of(root, complete_steps(root)[-1]) / "manifest.json").unlink()
    with pytest.raises(UserError, match="has no manifest.json: remove .* or set checkpoint.fallb"):
        Trainer(tiny(*words))

    for step in complete_steps(root):
        harm(folder_of(root, step))
    with pytest.raises(UserError, match="none of the checkpoints in .* is intact: restore one"):
        Trainer(tiny(*words, "--checkpoint.fallback", "true"))


def test_fallback_leaves_no_unhealthy_checkpoint_to_be_found_later(tiny, tmp_path, capsys):
    words = ("--training.steps", "12", "--checkpoint.every_steps", "2", "--checkpoint.keep", "9")
    trainer = Trainer(tiny(*words))
    poison(trainer, 6, 8)
    trainer.fit(until=9)
    trainer.close()

    root = tmp_path / "run" / "checkpoints"
    store.remove(folder_of(root, 9)).join()
    again = Trainer(tiny(*words))
    assert again.step == 8
    reason = "its loss or gradient norm, or that of the next step, was not finite"
    assert f"step-00000008: {reason}; going on" in capsys.readouterr().err
    again.close()

    again = Trainer(tiny(*words, "--checkpoint.fallback", "true"))
    assert again.step == 4, "8, 6 and 5's successor were bad"
    assert "CHECKPOINT NOT HEALTHY" in capsys.readouterr().err
    again.close()
    assert complete_steps(root) == [2, 4]
    assert (root / "latest").resolve().name == "step-00000004"
    assert {path.name for path in root.glob("un*")} == {"unhealthy-step-00000008"}

    harm(folder_of(root, 4))
    store.write_health(folder_of(root, 2), False)
    last = Trainer(tiny(*words, "--checkpoint.fallback", "true"))
    assert last.step == 2, "better an unhealthy one than none"
    last.close()


def test_a_checkpoint_of_another_format_is_no_damage(tiny, tmp_path):
    trainer = Trainer(tiny())
    trainer.fit(until=1)
    trainer.close()

    folder = folder_of(tmp_path / "run" / "checkpoints", 1)
    (folder / "manifest.json").write_text(json.dumps({"format": 9, "files": {}}))
    with pytest.raises(UserError, match="has format 9, this version reads format 2"):
        Trainer(tiny("--checkpoint.fallback", "true"))

    assert folder.is_dir()
