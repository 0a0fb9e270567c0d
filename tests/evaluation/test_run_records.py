import json

import pytest

from bitlm_dist.config_loading import load_config, to_yaml
from bitlm_dist.errors import UserError
from bitlm_dist.evaluation.compare import footnotes, json_report, table_rows
from bitlm_dist.evaluation.compare_plot import choose_curves
from bitlm_dist.evaluation.run_records import load_record, load_records

FULL = {"tokens": 1000, "bytes": 4000, "data": "full"}
PART = {"tokens": 100, "bytes": 400, "data": "part"}
OTHER_PART = {"tokens": 100, "bytes": 401, "data": "other part"}


def entry(step, scored, value, by="train", **fields):
    report = dict.fromkeys(("nats_per_token", "chain_bits_per_byte", "context_shuffle_delta_nats"))
    report |= {"bits_per_byte": value, "bits_per_byte_se": 0.1, "exact": True, "brier": []}
    tokens = {"tokens": scored["tokens"], "bytes": scored["bytes"]}
    costs = {"tokens": step, "predicted_tokens": step, "cpu_seconds": 1.0}
    about = {"by": by, "split": "validation", "scored": scored}
    return {"step": step, **costs, **about, "validation": {**report, **tokens}, **fields}


def old_entry(step, scored, value):
    """As versions wrote it that recorded nothing of the text."""
    new = entry(step, scored, value)
    return {name: new[name] for name in new.keys() - {"by", "split", "scored"}}


@pytest.fixture
def run_of(tiny_file, tmp_path):
    def make(name, *entries):
        folder = tmp_path / name
        folder.mkdir()
        config = load_config(tiny_file, ["--run.dir", str(folder)]).config
        (folder / "config.yaml").write_text(to_yaml(config, in_run_folder=True))
        lines = "".join(json.dumps(line) + "\n" for line in entries)
        (folder / "evaluations.jsonl").write_text(lines)
        return folder

    return make


def ratios(*folders):
    records = load_records(folders)
    return [row[6] for row in table_rows(records)], footnotes(records)


def test_runs_on_the_same_text_have_a_ratio(run_of):
    found, notes = ratios(
        run_of("a", entry(1, PART, 4.0), entry(2, PART, 2.0)), run_of("b", entry(9, PART, 1.0))
    )
    assert (found, notes) == (["1.000", "0.500"], [])


def test_runs_of_the_same_name_are_told_apart(run_of, tmp_path):
    (tmp_path / "old").mkdir()
    folders = run_of("a", entry(2, PART, 2.0)), run_of("old/a", entry(2, FULL, 1.0))
    records = load_records(folders)
    assert [row[0] for row in table_rows(records)] == [str(folder) for folder in folders]
    assert footnotes(records)[0].startswith(f"† {folders[1]}: no ratio")


def test_runs_on_different_texts_have_none_and_a_note_says_why(run_of):
    a = run_of("a", entry(2, PART, 2.0))
    for name, scored, count in (("b", FULL, "1,000"), ("c", OTHER_PART, "100")):
        found, (note,) = ratios(a, run_of(name, entry(2, scored, 1.0)))
        assert found == ["1.000", "– †"]
        expected = f"† {name}: no ratio, as it was scored on another text than a ({count} tokens"
        assert note.startswith(expected)
        assert "run `bitlm eval` on both" in note


def test_of_a_step_s_evaluations_that_of_the_text_that_all_share_is_compared(run_of):
    a = run_of("a", entry(2, PART, 2.0), entry(2, FULL, 3.0, by="eval"))
    b = run_of("b", entry(1, FULL, 9.0), entry(2, OTHER_PART, 5.0), entry(2, FULL, 1.5, by="eval"))
    assert ratios(a, b) == (["1.000", "0.500"], [])
    # What training scored goes first where it is the same.
    d = run_of("d", entry(2, PART, 1.8), entry(2, FULL, 3.0, by="eval"))
    assert ratios(a, d)[0] == ["1.000", "0.900"]
    assert load_records([a])[0].bits_per_byte == 2
    # An evaluation of an older step is no substitute.
    c = run_of("c", entry(1, FULL, 9.0), entry(2, OTHER_PART, 5.0))
    assert ratios(a, c)[0] == ["1.000", "– †"]


def test_training_s_own_evaluation_goes_before_later_ones_of_the_same_text(run_of):
    lines = [entry(2, PART, 2.0), entry(2, PART, 7.0, by="eval")]
    assert load_record(run_of("a", *lines)).bits_per_byte == 2
    assert load_record(run_of("b", *reversed(lines))).bits_per_byte == 2
    # Without one, the last try of `bitlm eval` counts.
    tries = [entry(2, PART, value, by="eval") for value in (8.0, 7.0)]
    assert load_record(run_of("c", *tries)).bits_per_byte == 7


def test_records_of_older_versions_stay_readable_and_are_marked(run_of):
    old = run_of("old", old_entry(2, PART, 2.0))
    found, (note,) = ratios(old, run_of("new", entry(2, PART, 1.0)))
    assert found == ["1.000", "0.500 ?"]
    assert note.startswith("? new: which text was scored is not recorded (older version)")
    # Another number of tokens is another text for certain.
    assert ratios(old, run_of("full", entry(2, FULL, 1.0)))[0] == ["1.000", "– †"]


def test_scores_of_the_training_text_are_not_compared(run_of):
    train = entry(3, FULL, 0.1, by="eval", split="train")
    assert load_record(run_of("a", entry(2, PART, 2.0), train)).bits_per_byte == 2
    expected = r"holds no evaluations: train it with .*, or evaluate it with `bitlm eval .*/b`"
    with pytest.raises(UserError, match=expected):
        load_record(run_of("b", train))


def test_lines_that_are_no_evaluations_are_skipped(run_of):
    folder = run_of("a", [], 3, {"step": 4}, entry(2, PART, 2.0))
    with (folder / "evaluations.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "val\xff')
    assert [line["step"] for line in load_record(folder).evaluations] == [2]


def test_the_comparison_as_json_says_what_the_table_says(run_of):
    runs = [
        run_of("a", entry(2, PART, 2.0)),
        run_of("b", entry(2, PART, 1.0)),
        run_of("c", entry(2, FULL, 1.0)),
        run_of("d", old_entry(2, PART, 1.0)),
    ]
    report = json_report(load_records(runs))
    assert report["base"] == str(runs[0])
    assert [run["ratio"] for run in report["runs"]] == [1.0, 0.5, None, 0.5]
    assert [run["same_text"] for run in report["runs"]] == [True, True, False, None]
    assert report["runs"][2]["scored"] == FULL
    assert len(report["notes"]) == 2


def test_curves_are_of_one_text_or_say_that_they_are_not(run_of):
    steps = (1, 2, 3)
    eval_of_all = entry(3, FULL, 1.0, by="eval")
    a = run_of("a", *(entry(step, PART, 2.0) for step in steps), eval_of_all)
    b = run_of("b", *(entry(step, PART, 1.0) for step in steps), eval_of_all)
    c = run_of("c", *(entry(step, OTHER_PART, 1.0) for step in steps), eval_of_all)
    old = run_of("old", *(old_entry(step, PART, 1.0) for step in steps))

    def found(*folders):
        curves, note = choose_curves([load_record(folder) for folder in folders])
        return [[point["validation"]["tokens"] for point in curve] for curve in curves], note

    part = [100] * 3
    assert found(a, b) == ([part, part], "")
    assert found(a, c) == ([part, part], "† scored on different texts: no comparison")
    assert found(a, old) == ([part, part], "? which texts were scored is not recorded")
    assert found(a) == ([part], "")
    only_eval = run_of("d", entry(3, FULL, 1.0, by="eval"))
    assert found(only_eval, run_of("e", eval_of_all)) == ([[1000], [1000]], "")
