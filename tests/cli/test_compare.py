import json
import shutil
import sys

import pytest

from bitlm_dist.errors import UserError

QUICK = ("--evaluation.num_noise_levels", 2, "--evaluation.num_sampled_blocks", 8)


@pytest.fixture
def evaluated(trained, bitlm):
    """A run that training did not evaluate, but `bitlm eval` did."""
    bitlm("eval", trained, *QUICK, "--evaluation.num_sequences", 4)
    return trained


def test_runs_that_training_did_not_evaluate_are_compared_by_eval_s_records(evaluated, bitlm):
    report = json.loads(bitlm("compare", evaluated, evaluated, "--json").stdout)
    assert [run["ratio"] for run in report["runs"]] == [1.0, 1.0]
    assert report["runs"][0]["by"] == "eval"

    plot = evaluated.parent / "plot.svg"
    assert "0.00M" in bitlm("compare", evaluated, "--plot", plot, "--axis", "cpu_seconds").stdout
    assert plot.read_text().startswith("<?xml")

    # A table that does not fit is printed as lines, none of which is empty of content.
    assert "bits per byte: <= " in bitlm("compare", evaluated, columns=20).stdout


def test_another_text_has_no_ratio(evaluated, trained_run, bitlm, tmp_path):
    other = shutil.copytree(trained_run, tmp_path / "other")
    bitlm("eval", other, *QUICK, "--evaluation.num_sequences", 3)
    output = bitlm("compare", evaluated, other).stdout
    assert "– †" in output
    assert "† other: no ratio, as it was scored on another text than run" in output


def test_what_cannot_be_printed_or_plotted_is_one_line(evaluated, bitlm, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"--plot needs matplotlib.*, which is missing: pip inst"):
        bitlm("compare", evaluated, "--plot", evaluated.parent / "plot.svg")
    assert not (evaluated.parent / "plot.svg").exists()

    with pytest.raises(UserError, match="--markdown and --json exclude each other"):
        bitlm("compare", evaluated, "--markdown", "--json")
