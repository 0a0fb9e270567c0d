import json

import pytest

from bitlm_dist.acceptance import checks
from bitlm_dist.acceptance.checks import all_checks, check_attention, check_doctor, predict
from bitlm_dist.acceptance.commands import CheckFailedError, CheckSkippedError
from bitlm_dist.acceptance.context import Context
from bitlm_dist.acceptance.sizes import SIZES
from bitlm_dist.cli.doctor import ATTENTION_BACKENDS


class Answers:
    """Stands for the commands; answers with what a test says."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []

    def bitlm(self, *words, **environment):
        self.calls.append(words)
        return json.dumps(self.answer)

    def module(self, *words, **environment):
        self.calls.append(words)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def context(answer, tmp_path, num_cards=1):
    return Context(SIZES["gpu"], {"num_cards": num_cards}, tmp_path, Answers(answer))


def finding(name, found, note=""):
    return {"name": name, "found": found, "note": note}


def test_doctor_tells_what_others_skip(tmp_path):
    answer = {
        "machine": [finding("device", True, "1 x H100")],
        "attention": [finding("fa4", False, "no package"), finding("merge", True)],
    }
    made = context(answer, tmp_path)
    assert check_doctor(made) == {"device": "1 x H100", "not_found": ["fa4"]}

    made.commands.answer = {"num_cases": 7, "mismatches": {}, "not_supported": {}}
    with pytest.raises(CheckSkippedError, match="no package"):
        check_attention("fa4", made)
    assert check_attention("merge", made)["num_cases"] == 7
    # if doctor failed, nothing is skipped for it
    made.findings = {}
    assert check_attention("fa4", made)["num_cases"] == 7


def test_doctor_fails_without_a_usable_device(tmp_path):
    answer = {"machine": [finding("device", False, "the driver is too old")]}
    with pytest.raises(CheckFailedError, match="the driver is too old"):
        check_doctor(context(answer, tmp_path))


def test_a_backend_that_differs_fails_and_one_without_cases_is_skipped(tmp_path):
    answer = {"num_cases": 3, "mismatches": {"a": "its output differs", "b": "x"}}
    with pytest.raises(CheckFailedError, match="a: its output differs; and 1 more"):
        check_attention("flex", context(answer, tmp_path))

    answer = {"num_cases": 0, "mismatches": {}, "not_supported": {"a": "no backward"}}
    with pytest.raises(CheckSkippedError, match="no backward"):
        check_attention("flex", context(answer, tmp_path))


def test_a_prediction_that_is_refused_is_skipped_and_one_that_breaks_fails(tmp_path):
    with pytest.raises(CheckSkippedError, match="no compiler"):
        predict(context(CheckFailedError("no compiler", code=2), tmp_path))
    with pytest.raises(CheckFailedError, match="broken"):
        predict(context(CheckFailedError("broken", code=1), tmp_path))


def test_every_measured_run_is_predicted(tmp_path):
    made = context({}, tmp_path, num_cards=8)
    predict(made)
    runs = json.loads(made.commands.calls[0][1])
    names = [check.name for check in all_checks(made)]
    measured = {name for name in names if name.startswith("training: ")} - {"training: fp8"}
    assert runs.keys() == measured
    assert runs["training: default, 8 cards"]["world_size"] == 8
    assert len(names) == len(set(names))


def test_every_backend_is_checked():
    assert list(checks.ATTENTION) == list(ATTENTION_BACKENDS)
