import json

import pytest

from bitlm_dist.checkpoint.steps import complete_steps, folder_of
from bitlm_dist.errors import UserError
from bitlm_dist.training.trainer import Trainer

pytestmark = pytest.mark.integration


class Evaluation:
    """An evaluation that returns a report, or fails in the given calls (1-based)."""

    def __init__(self, *failing):
        self.calls = 0
        self.failing = failing

    def __call__(self, model):
        self.calls += 1
        assert not model.training
        if self.calls in self.failing:
            raise ValueError("nothing to\nevaluate")
        return {"score": self.calls}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_failed_evaluation_is_reported_and_counted_and_training_goes_on(tiny, tmp_path, capsys):
    evaluation = Evaluation(1, 2, 4)
    trainer = Trainer.build(tiny("--evaluation.every_steps", "1")).open()
    trainer.fit(evaluate=evaluation)
    assert trainer.is_done
    trainer.close()

    run = tmp_path / "run"
    assert [line["step"] for line in lines(run / "evaluations.jsonl")] == [3, 5, 6]
    assert [line["evaluation_failures"] for line in lines(run / "metrics.jsonl")] == [
        0,
        1,
        2,
        2,
        3,
        3,
    ]
    assert (
        json.loads((folder_of(run / "checkpoints", 6) / "state.json").read_text())[
            "evaluation_failures"
        ]
        == 3
    )

    said = capsys.readouterr().err
    assert said.count("Traceback (most recent call last)") == 3
    assert (
        "bitlm: the evaluation of step 2 failed on rank 0: ValueError: nothing to evaluate\n"
        in said
    )
    assert "bitlm: training goes on; 3 failures in a row end the run, this was number 2" in said
    assert said.count("this was number 1") == 2, "a success begins the count anew"


def test_the_third_failure_in_a_row_ends_a_run_which_is_saved_first(tiny, tmp_path):
    evaluation = Evaluation(2, 3, 4)
    trainer = Trainer.build(tiny("--evaluation.every_steps", "1")).open()
    message = "failed, the last at step 4, .*set evaluation.every_steps = 0"
    with pytest.raises(UserError, match=f"3 evaluations in a row {message}"):
        trainer.fit(evaluate=evaluation)
    trainer.close()
    assert complete_steps(tmp_path / "run" / "checkpoints") == [4]

    again = Trainer.build(tiny("--evaluation.every_steps", "1")).open()
    again.fit(evaluate=evaluation)
    assert again.is_done
    again.close()

    found = lines(tmp_path / "run" / "evaluations.jsonl")
    assert [line["step"] for line in found] == [1, 4, 5, 6], (
        "the resumed run makes the one that failed last"
    )
    assert lines(tmp_path / "run" / "metrics.jsonl")[-1]["evaluation_failures"] == 3


@pytest.mark.distributed
def test_a_failure_on_one_rank_is_a_failure_on_all_and_none_waits_for_another(
    tiny, tiny_file, prepared, tmp_path
):
    from ranks import run_ranks

    words = [
        "--data.path",
        str(prepared),
        "--run.dir",
        str(tmp_path / "run"),
        "--evaluation.every_steps",
        "2",
        "--evaluation.num_samples",
        "1",
    ]
    folder = tmp_path / "job"
    folder.mkdir()
    found = run_ranks(
        2, "evaluating", "one_rank_fails", str(tiny_file), words, folder=folder, timeout=120
    )

    assert found == [(6, 1, 6), (6, 1, 6)], "all steps, one failure, the last evaluation"
    for name in ("evaluations.jsonl", "samples.jsonl"):  # the first rank writes the texts alone
        assert [line["step"] for line in lines(tmp_path / "run" / name)] == [2, 6]
    assert (
        "the evaluation of step 4 failed on rank 1: ValueError: only here"
        in (folder / "log.1").read_text()
    )
    assert (
        "training goes on; 3 failures in a row end the run, this was number 1"
        in (folder / "log.0").read_text()
    )

    # What the ranks record becomes one value.
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["average"] for row in rows] == [10.5] * 6
    assert [row["largest"] for row in rows] == [13.0] * 4 + [None] * 2, "also if one rank has NaN"
    assert [row.get("total") for row in rows] == [0.0, 1.0, None, 3.0, 4.0, 5.0]

    # The counts of a step are those of all ranks.
    alone = Trainer.build(tiny("--run.dir", str(tmp_path / "alone"))).open()
    alone.fit()
    alone.close()

    names = ("predicted_tokens", "text_bytes", "epochs")
    counts = [
        [[line[name] for name in names] for line in lines(tmp_path / run / "metrics.jsonl")]
        for run in ("run", "alone")
    ]
    assert counts[0] == counts[1]
