import re

import pytest

from bitlm_dist.checkpoint.steps import MANIFEST
from bitlm_dist.config_loading import load_config
from bitlm_dist.errors import UserError
from bitlm_dist.training.disk_space import (
    FreeSpaceWatch,
    check_disk_space,
    estimate_checkpoint_bytes,
)
from bitlm_dist.training.trainer import Trainer


@pytest.mark.parametrize(
    "words",
    [
        ("--training.precision", "fp32"),
        pytest.param(
            ("--training.precision", "bf16", "--optimizer.ema", "0.9"), marks=pytest.mark.slow
        ),
        pytest.param(("--optimizer.matrix_optimizer", "adamw"), marks=pytest.mark.slow),
        pytest.param(("--model.output", "softmax"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_the_estimate_is_what_a_checkpoint_takes(tiny, tmp_path, words):
    trainer = Trainer.build(tiny(*words, "--training.steps", "1")).open()
    named = [pair for chunk in trainer.engine.chunks for pair in chunk.named_parameters()]
    estimate = estimate_checkpoint_bytes(trainer.config, trainer.engine.num_parameters, named)
    trainer.fit()
    trainer.close()
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    assert estimate <= size <= estimate * 1.02 + 50_000, (
        "headers and step counts are small beside it"
    )


def test_room_is_known_before_the_first_step(tiny, small_disk, capsys):
    run = small_disk / "run"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(4 * 2**20 - 200_000))
    with pytest.raises(
        UserError,
        match=r"checkpoints has no room for a checkpoint, which takes about .* KiB: "
        r"1.* KiB are free",
    ):
        Trainer.build(tiny("--run.dir", str(run))).open()

    assert not run.exists(), "a refused start leaves nothing"
    filler.unlink()
    trainer = Trainer.build(tiny("--run.dir", str(run), "--checkpoint.keep", "50")).open()
    assert "52 more checkpoints of about" in capsys.readouterr().err
    trainer.close()


def test_a_disk_that_fills_up_is_told_of_once_and_while_there_is_time(small_disk, capsys):
    config = load_config(None, ["--checkpoint.keep", "1"]).config.checkpoint
    root = small_disk / "checkpoints"
    watch = FreeSpaceWatch(root, config)
    watch.check(2**20)
    assert capsys.readouterr().err == ""

    filler = small_disk / "filler"
    filler.write_bytes(bytes(2 * 2**20))
    for _ in range(2):
        watch.check(2**20)
    assert re.fullmatch(
        r"bitlm: warning: .*checkpoints has 2 MiB free, and up to 3 more checkpoints of about "
        r"1 MiB each will be kept there at once \(checkpoint.keep = 1\): make room, or .*\n",
        capsys.readouterr().err,
    )

    filler.unlink()
    watch.check(2**20)
    filler.write_bytes(bytes(2 * 2**20))
    watch.check(2**20)
    assert capsys.readouterr().err.count("warning") == 1, "anew, as there was room in between"


def test_what_is_there_and_what_a_kill_left_count(small_disk):
    config = load_config(None, ["--checkpoint.keep", "1"]).config.checkpoint
    root = small_disk / "checkpoints"
    for step in (1, 2):
        folder = root / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text("{}")

    building = root / ".step-00000003.partial"
    building.mkdir()
    (building / "rank-00000.safetensors").write_bytes(bytes(3 * 2**20))
    assert check_disk_space(root, 3 * 2**20, config) == "", (
        "the next save removes what a killed process left"
    )

    with pytest.raises(UserError, match="which takes about 5 MiB"):
        check_disk_space(root, 5 * 2**20, config)
