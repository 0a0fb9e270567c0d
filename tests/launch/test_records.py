import json

from bitlm_dist.launch.records import EVALUATIONS, METRICS, last_records, read_json, read_jsonl
from bitlm_dist.training import metrics


def test_the_names_are_those_of_training():
    assert (METRICS, EVALUATIONS) == (metrics.METRICS, metrics.EVALUATIONS)


def test_the_end_of_a_long_log_is_read_and_half_lines_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "text": "x" * 500}) for step in range(1000)]
    file.write_text("\n".join(lines) + '\n{"step": 10')
    assert [entry["step"] for entry in last_records(file, 3)] == [997, 998, 999]
    assert len(list(read_jsonl(file))) == 1000
    file.write_text("\n".join(lines[:2]) + "\n")
    assert [entry["step"] for entry in last_records(file, 3)] == [0, 1]


def test_what_is_not_there_is_empty(tmp_path):
    assert list(read_jsonl(tmp_path / "no")) == last_records(tmp_path / "no", 3) == []
    assert read_json(tmp_path / "no") == {}
    (tmp_path / "list").write_text("[1]")
    assert read_json(tmp_path / "list") == {}
