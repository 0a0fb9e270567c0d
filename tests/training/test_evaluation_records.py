import json
import os

from bitlm_dist.training.evaluation_records import (
    BY_EVAL,
    ScoredText,
    append_evaluation,
    evaluation_record,
    read_evaluations,
    scored_text,
)

SCORED = {"tokens": 3, "bytes": 9, "data": "abc"}


def test_a_record_says_what_was_scored_beside_the_report():
    record = evaluation_record({"step": 4}, {"bits_per_byte": 1.5, "scored": SCORED}, BY_EVAL)
    assert record.pop("time") > 1.7e9
    about = {"step": 4, "by": "eval", "split": "validation", "scored": SCORED}
    assert record == {**about, "validation": {"bits_per_byte": 1.5}}
    assert scored_text(record) == ScoredText("validation", 3, "abc")
    assert scored_text({"step": 4, "validation": {}}) is None


def test_a_record_after_a_line_that_a_kill_has_cut_is_not_lost(tmp_path):
    record = evaluation_record({"step": 4}, {"scored": SCORED}, BY_EVAL)
    append_evaluation(tmp_path, record)
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 5, "valid')

    append_evaluation(tmp_path, {**record, "step": 3})
    assert [found["step"] for found in read_evaluations(tmp_path)] == [3, 4]
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(lines[i])["step"] for i in (0, 2)] == [4, 3]
    assert read_evaluations(tmp_path / "none") == []


def test_a_line_that_is_written_in_parts_is_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    append_evaluation(tmp_path, evaluation_record({"step": 4}, {"scored": SCORED}, BY_EVAL))
    assert [found["step"] for found in read_evaluations(tmp_path)] == [4]
