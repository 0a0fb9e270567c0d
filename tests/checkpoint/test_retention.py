import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlm_dist.checkpoint import retention, store
from bitlm_dist.checkpoint.retention import checkpoints_to_delete
from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.checkpoint.tensors import ShardEntry


@pytest.mark.parametrize(
    ("health", "keep", "every", "expected"),
    [
        ({1: True, 2: True, 3: True}, 2, 0, [1]),
        ({1: True, 2: True, 3: None}, 2, 0, []),  # not known yet: beside the healthy ones
        ({1: True, 2: None, 3: True, 4: True}, 2, 0, [1, 2]),  # never found out
        ({1: True, 2: False, 3: False}, 1, 0, [2]),  # a bad one removes nothing but older bad ones
        ({1: None, 2: False}, 1, 0, []),
        ({10: True, 15: True, 20: False, 25: True, 30: True}, 1, 10, [15, 20, 25]),
        ({}, 1, 0, []),
    ],
)
def test_which_may_go(health, keep, every, expected):
    assert checkpoints_to_delete(health, keep, every) == expected


@given(
    st.dictionaries(st.integers(1, 60), st.sampled_from([True, False, None])),
    st.integers(1, 4),
    st.integers(0, 7),
)
def test_nothing_that_could_be_needed_goes(health, keep, every):
    gone = checkpoints_to_delete(health, keep, every)
    healthy = sorted(step for step, good in health.items() if good)
    assert not set(healthy[-keep:]) & set(gone)
    assert not {step for step in healthy if every and step % every == 0} & set(gone)
    assert max(health, default=0) not in gone, "the newest stays"

    for step in gone:
        assert health[step] is False or any(other > step for other in healthy), (
            "only a healthy one replaces another"
        )


def test_folders_go(tmp_path):
    health = {1: True, 2: True, 3: True}
    for step in health:
        folder = store.save(
            tmp_path, step, [ShardEntry("a", "F32", (2,), (0,), (2,))], [torch.zeros(2)], {}
        )
        assert folder.is_dir()

    retention.prune(tmp_path, health, 2, 0)
    assert complete_steps(tmp_path) == [2, 3] == list(health)
