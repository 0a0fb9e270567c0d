from dataclasses import replace

import pytest

from bitlm_dist.launch.attempts import STOPPED_BY_USER, Attempt, Outcome
from bitlm_dist.launch.next_action import next_action


def attempt(outcome, begun=0, reached=0, reason="why"):
    return Attempt(1, "7", 0, ("n0",), 0.0, begun, outcome, reason, reached)


@pytest.mark.parametrize(
    ("last", "cancelled", "action"),
    [
        (attempt(Outcome.DONE), False, "end"),
        (attempt(Outcome.DONE), True, "end"),
        (attempt(Outcome.STOPPED, 0, 5), False, "requeue"),
        (attempt(Outcome.STOPPED, 0, 5), True, "end"),
        (attempt(Outcome.STOPPED, 0, 5, STOPPED_BY_USER + ", saved at step 5"), False, "end"),
        (attempt(Outcome.REFUSED), False, "give up"),
        (attempt(Outcome.DIVERGED, 0, 5), False, "give up"),
        (attempt(Outcome.DIVERGED, 0, 5), True, "end"),
        (attempt(Outcome.FAILED, 0, 5), False, "restart"),
        (attempt(Outcome.FAILED, 0, 5), True, "end"),
        (attempt(Outcome.HUNG), False, "restart"),
        (attempt(Outcome.LOST), False, "restart"),
        (attempt(Outcome.BAD_NODES), False, "resubmit"),
    ],
)
def test_what_comes_after_an_attempt(last, cancelled, action):
    decision = next_action([last], 2, cancelled, ["n3"])
    assert decision.action == action
    assert decision.exclude == (("n3",) if action == "resubmit" else ())


@pytest.mark.parametrize("outcome", [Outcome.STOPPED, Outcome.FAILED, Outcome.HUNG, Outcome.LOST])
def test_no_run_goes_round_in_circles(outcome):
    idle = attempt(outcome, 5, 5)
    assert next_action([idle] * 2, 2, False).action != "give up"
    decision = next_action([idle] * 3, 2, False)
    assert decision.action == "give up"
    assert decision.reason == "3 attempts in a row made no new checkpoint; the last: why"
    after = attempt(outcome, 6, 6)
    assert (
        next_action([idle, idle, attempt(outcome, 5, 6), after, after], 2, False).action
        != "give up"
    ), "a checkpoint resets the count"
    back = [
        attempt(outcome, 3, 6),
        attempt(outcome, 6, 3),
        attempt(outcome, 3, 6),
        attempt(outcome, 6, 3),
    ]
    assert next_action(back, 2, False).action == "give up", (
        "getting where it was before is no progress"
    )
    assert next_action([idle], 0, False).action == "give up"
    mended = replace(idle, submission="later")
    assert next_action([idle] * 9 + [mended], 2, False).action != "give up", (
        "what the user does begins anew"
    )


def test_bad_nodes_are_no_restarts():
    assert (
        next_action([attempt(Outcome.BAD_NODES, 5, 5)] * 9, 2, False, ["n3"]).action == "resubmit"
    )


def test_what_must_be_mended_ends_only_what_never_worked():
    assert (
        next_action(
            [attempt(Outcome.FAILED, 0, 5), attempt(Outcome.REFUSED, 5, 5)], 2, False
        ).action
        == "restart"
    )


@pytest.mark.parametrize(
    ("reason", "action"),
    [
        ("shard 3 is damaged", "give up"),
        ("/x: no space left on device: make room on /disk, or elsewhere", "restart"),
    ],
)
def test_the_same_refusal_twice_ends_a_run_but_a_full_disk_is_waited_for(reason, action):
    began = attempt(Outcome.REFUSED, 0, 5, reason)
    again = attempt(Outcome.REFUSED, 5, 5, reason)
    assert next_action([began], 2, False).action == "restart", "it has made a checkpoint"
    assert next_action([began, again], 2, False).action == action
    assert next_action([began, again, again, again], 2, False).action == "give up"
    other = replace(again, reason="something else")
    further = replace(again, reached=6)
    for last in (other, further, replace(again, submission="later")):
        assert "twice in a row" not in next_action([began, last], 2, False).reason
    assert next_action([began, further], 2, False).action == "restart"
