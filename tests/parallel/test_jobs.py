"""Jobs of several ranks: a run that changes its layout, and one in which a rank dies."""

import json
import time
from pathlib import Path

import pytest
import torch
from ranks import mark_by_duration, run_ranks, selected_cases, start_job

from bitlm_dist.training.trainer import Trainer
from bitlm_dist.training.weights import load_trained_model

pytestmark = pytest.mark.distributed


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


TP = ["--parallel.tensor", "2"]
SP = ["--parallel.tensor", "2", "--parallel.sequence", "true"]
PP = ["--parallel.pipeline", "2"]
CP = ["--parallel.context", "2"]
DP = []
ONE = []
ZERO_1 = ["--parallel.head.zero_stage", "1"]
ZERO_3 = ["--parallel.head.zero_stage", "3"]
FSDP_2, FSDP_3 = (
    ["--parallel.head.engine", "fsdp2", "--parallel.head.zero_stage", stage] for stage in "23"
)
PIECES = ["--optimizer.sharded", "false", "--parallel.micro_batch_size", "2"]
AS_TWO_BY_TWO = ["--parallel.head.shard_ranks", "2", "--parallel.optimizer_shard_ranks", "2"]
MUON = ["--optimizer.matrix_optimizer", "muon"]
ADAMW = ["--optimizer.matrix_optimizer", "adamw"]
BF16 = ["--training.precision", "bf16"]
# settings; ranks and layout that save after step 5, that load and go on to step 10
CHANGES = {
    "TP2 to PP2": (MUON, (2, TP), (2, PP)),
    "PP2 to TP2": (MUON, (2, PP), (2, TP)),
    "TP2 to DP2": (MUON, (2, TP), (2, DP)),
    "DP2 to TP2": (MUON, (2, DP), (2, TP)),
    "TP2 to TP2 PP2": (MUON, (2, TP), (4, [*TP, *PP])),
    "TP2 PP2 to TP2": (MUON, (4, [*TP, *PP]), (2, TP)),
    "TP2 SP to one": (MUON, (2, SP), (1, ONE)),
    "one to TP2 SP": (MUON, (1, ONE), (2, SP)),
    "ZeRO 1 to 3": (MUON, (2, ZERO_1), (2, ZERO_3)),
    "ZeRO 3 to 1": (MUON, (2, ZERO_3), (2, ZERO_1)),
    "ZeRO 3 to FSDP2": (MUON, (2, ZERO_3), (2, FSDP_2)),
    "PP2 DP2, ZeRO 3 to one": (ADAMW, (4, [*PP, *ZERO_3]), (1, ONE)),
    "one to PP2 DP2, ZeRO 1": (ADAMW, (1, ONE), (4, [*PP, *ZERO_1])),
    "DP4 as 2x2 to TP2": (MUON, (4, [*AS_TWO_BY_TWO, *FSDP_3]), (2, TP)),
    "TP2 to DP4 as 2x2": (MUON, (2, TP), (4, [*AS_TWO_BY_TWO, *FSDP_3])),
    "DP2, Megatron's AdamW, to CP2": (ADAMW, (2, DP), (2, CP)),
    "whole AdamW, microbatches, to DP2": (ADAMW, (2, PIECES), (2, DP)),
    "bf16, CP2 to TP2 SP": ([*ADAMW, *BF16], (2, CP), (2, SP)),
    "bf16, FSDP2 to ZeRO 3": ([*ADAMW, *BF16], (2, FSDP_3), (2, ZERO_3)),
}
HALF = 5
END = 10
# Between axes of parallelism, between engines of the head, and from many ranks to one.
QUICK = {"TP2 to PP2", "ZeRO 3 to FSDP2", "PP2 DP2, ZeRO 3 to one"}


@pytest.fixture(scope="module")
def changed(prepared, tiny_file, tmp_path_factory, request):
    """Make every change of layout, in as few launches as possible.

    Returns:
        The folder of the runs, which are named by changes and settings.
    """
    changes = selected_cases(request, CHANGES)
    root = tmp_path_factory.mktemp("changes")
    common = [
        "--data.path",
        str(prepared),
        "--training.steps",
        str(END),
        "--optimizer.weight_decay",
        "0.1",
        "--optimizer.ema",
        "0.5",
    ]

    def jobs(ranks, half):
        return [
            (
                [*common, *settings, *places[half][1], "--run.dir", str(root / name)],
                (HALF, END)[half],
            )
            for name, (settings, *places) in changes.items()
            if places[half][0] == ranks
        ]

    settings = {" ".join(settings): settings for settings, *_ in changes.values()}
    wholes = [
        ([*common, *words, "--run.dir", str(root / name)], END) for name, words in settings.items()
    ]
    launches = [
        (1, [*wholes, *jobs(1, 0)]),
        (4, jobs(4, 0)),
        (2, [*jobs(2, 0), *jobs(2, 1)]),
        (4, jobs(4, 1)),
        (1, jobs(1, 1)),
    ]

    for number, (ranks, part) in enumerate(launches):
        folder = root / f"launch {number}"
        folder.mkdir()
        if part:
            run_ranks(ranks, "parity", "fit_in_turn", str(tiny_file), part, folder=folder)
    return root


@pytest.mark.parametrize("case", mark_by_duration(CHANGES, QUICK, CHANGES))
def test_a_run_goes_on_under_another_layout(case, changed, tiny):
    """Losses equal those of one process that was never stopped, up to rounding.

    The moving average continues, too.
    """
    settings = CHANGES[case][0]
    whole = changed / " ".join(settings)
    run = changed / case
    near, close = (1e-3, 2e-2) if "bf16" in settings else (1e-5, 1e-4)
    found = losses(run)
    expected = losses(whole)
    print(
        f"{case}: {max(abs(a / b - 1) for a, b in zip(found, expected, strict=True)):.0e} relative"
    )

    assert len(found) == END
    assert found == pytest.approx(expected, rel=near)
    for averaged in ("false", "true"):
        words = [*settings, "--optimizer.ema", "0.5", "--evaluation.use_ema", averaged]
        (_, one, _), (_, model, step) = (
            load_trained_model(folder, tiny(*words)) for folder in (whole, run)
        )
        assert step == END
        for a, b in zip(one.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=close)


def test_two_data_ranks_learn_from_a_teacher_what_one_process_learns(tiny, tmp_path):
    teacher = Trainer.build(
        tiny("--model.output", "softmax", "--run.dir", str(tmp_path / "teacher"))
    ).open()
    teacher.fit()
    teacher.close()
    settings = ["--training.steps", "4", "--distillation.teacher", str(tmp_path / "teacher")]
    whole = Trainer.build(tiny(*settings, "--run.dir", str(tmp_path / "whole"))).open()
    whole.fit()
    whole.close()
    common = [*settings, "--data.path", str(tiny().data.path), "--run.dir", str(tmp_path / "run")]

    (tmp_path / "ranks").mkdir()
    run_ranks(2, "parity", "fit_in_turn", str(tiny.file), [(common, 4)], folder=tmp_path / "ranks")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.parametrize(("where", "ranks", "failed"), [("collective", 3, 1), ("head", 4, 3)])
def test_a_rank_that_dies_is_named_once_and_ends_the_job(where, ranks, failed, tiny, tmp_path):
    """In the second case it is a rank of the head, for whose gradients the first stage waits."""
    words = [
        "train",
        str(tiny.file),
        "--data.path",
        str(tiny().data.path),
        "--run.dir",
        str(tmp_path / "run"),
    ]
    words += ["--parallel.pipeline", "2"] if where == "head" else []
    (tmp_path / "ranks").mkdir()
    processes = start_job(ranks, "parity.fail", failed, where, words, folder=tmp_path / "ranks")
    try:
        processes[failed].join(300)
        assert processes[failed].exitcode == 1
        time.sleep(2)  # the others must leave it the word until the launcher ends them, at once
    finally:
        for process in processes:
            process.kill()
            process.join()

    lines = [
        line for log in (tmp_path / "ranks").glob("log.*") for line in log.read_text().splitlines()
    ]
    said = [line for line in lines if line.startswith("bitlm:")]

    assert len(said) == 1
    assert said[0].startswith(f"bitlm: rank {failed} on ")
    assert said[0].endswith("on fire")
