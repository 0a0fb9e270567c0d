import json

import pytest

from bitlm_dist.acceptance.report import CheckResult, Report, State, Status, card_slug, mfu

MACHINE = {
    "card": "NVIDIA H100 80GB HBM3",
    "num_cards": 2,
    "memory_bytes": 80 * 2**30,
    "capability": [9, 0],
    "peak_flops": 1000.0,
    "driver": "580.1",
    "cuda": "13.0",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0"},
    "commit": "abc",
    "changed": True,
}
RUN = {
    "num_cards": 2,
    "tokens_per_second": 30.0,
    "peak_bytes": 3 * 2**30,
    "first_loss": 2.5,
    "last_loss": float("nan"),
}
PREDICTED = {"flops_per_token": 20.0, "peak_bytes": 2**30}


@pytest.mark.parametrize(
    ("card", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"),
        ("cpu", "cpu"),
        ("../x|y\n", "x-y"),
        ("", "unknown"),
    ],
)
def test_the_slug_is_a_file_name(card, slug):
    assert card_slug(card) == slug


def test_mfu_is_per_card():
    assert mfu(RUN, PREDICTED, MACHINE) == 20.0 * 30.0 / (2 * 1000.0)
    assert mfu(RUN, PREDICTED, {**MACHINE, "peak_flops": None}) is None
    assert mfu(RUN, {}, MACHINE) is mfu({}, PREDICTED, MACHINE) is None


def test_page_and_json_hold_every_result(tmp_path):
    report = Report(
        MACHINE,
        results=[
            CheckResult("prediction", Status.DONE, 1.0, numbers={"training: x": PREDICTED}),
            CheckResult("training: x", Status.DONE, 2.0, numbers=RUN),
            CheckResult("bad", Status.FAILED, 3.0, "a | b\nc", output="the end"),
            CheckResult("none", Status.SKIPPED, 0.0, "no card"),
        ],
    )
    report.save(tmp_path)
    page = (tmp_path / "gpu-h100-80gb-hbm3.md").read_text()
    assert "| bad | failed | 3.0 | a \\| b c |" in page
    assert "| x | 30 | 30.0 % | 3.00 | 1.00 | 2.500 … nan |" in page
    assert "Not complete: running" in page
    assert "abc with changes" in page

    record = json.loads((tmp_path / "gpu-h100-80gb-hbm3.json").read_text())
    assert [result["status"] for result in record["results"]] == [
        "done",
        "done",
        "failed",
        "skipped",
    ]
    assert record["results"][2]["output"] == "the end"
    assert record["results"][1]["numbers"]["last_loss"] is None  # strict JSON has no NaN
    assert report.has_failed

    report.state = State.COMPLETE
    assert "Not complete" not in report.to_page()
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "gpu-h100-80gb-hbm3.json",
        "gpu-h100-80gb-hbm3.md",
    ]
