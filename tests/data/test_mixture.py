import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitlm_dist.data import mixture
from bitlm_dist.data.mixture import Mixture, interpolate_weights, uniform
from bitlm_dist.errors import UserError


def constant(*weights):
    return [[(0, weight)] for weight in weights]


def places(mixed, first, count):
    return [mixed.locate(number) for number in range(first, first + count)]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
    st.integers(0, 60),
)
def test_each_source_is_read_in_order_and_in_its_share(parts, per_step, seed, late):
    weights = [part / sum(parts) for part in parts]
    found = places(
        Mixture(constant(*weights), per_step, seed, [None] * len(parts)), 0, 100 * per_step
    )
    for source, weight in enumerate(weights):
        mine = [number for s, number in found if s == source]
        assert mine == list(range(len(mine))), "none lost, none twice"
        for step in range(100):
            inside = sum(
                1 for s, _ in found[step * per_step : (step + 1) * per_step] if s == source
            )
            assert abs(inside - weight * per_step) < 1 + 1e-9

    # The first access, without any history.
    again = Mixture(constant(*weights), per_step, seed, [None] * len(parts))
    assert (
        places(again, late * per_step, per_step) == found[late * per_step : (late + 1) * per_step]
    )


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4).filter(
        lambda p: np.all(np.sum(p, 0) > 0)
    ),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.integers(0, 60),
    st.integers(0, 2**32 - 1),
)
def test_another_mixture_continues_every_source(parts, per_step, change, seed):
    """Change weights and batch size at a step.

    No sequence of a source may be lost or repeated, and no limit may start anew.
    """
    old, new = ([part / sum(column) for part in column] for column in zip(*parts, strict=True))
    first = Mixture(constant(*old), per_step[0], seed, [None] * len(parts))
    sequence = change * per_step[0]
    taken = first.sequences_before(change).tolist()
    limits = [None] * (len(parts) - 1) + [taken[-1] + 3 * per_step[1] if len(parts) > 1 else None]
    second = Mixture(
        constant(*new),
        per_step[1],
        seed,
        limits,
        first_step=change,
        first_sequence=sequence,
        sequences_read=taken,
    )

    # No other source is left when the limit is reached.
    if new[-1] == 1:
        return

    found = places(first, 0, sequence) + places(second, sequence, 50 * per_step[1])
    for source, weight in enumerate(new):
        mine = [number for s, number in found if s == source]
        assert mine == list(range(len(mine)))
        assert limits[source] is None or len(mine) <= limits[source]
        inside = sum(1 for s, _ in found[sequence : sequence + per_step[1]] if s == source)
        assert abs(inside - weight * per_step[1]) < 1 + 1e-9


def test_a_limit_below_what_was_read_ends_the_source(seed):
    mixed = Mixture(
        constant(0.5, 0.5),
        8,
        seed,
        [40, None],
        first_step=20,
        first_sequence=160,
        sequences_read=[100, 60],
    )
    assert mixed.sequences_before(30).tolist() == [100, 60 + 80]


def test_shares_are_right_on_average(seed):
    mixed = Mixture(constant(0.05, 0.3, 0.65), 7, seed, [None] * 3)
    steps = 20_000
    np.testing.assert_allclose(
        mixed.sequences_before(steps) / (7 * steps), [0.05, 0.3, 0.65], atol=0.004
    )


def test_weights_change_with_the_steps(seed):
    rising = [(100, 0.0), (300, 1.0)]
    assert interpolate_weights(rising, np.array([0, 100, 200, 300, 999])).tolist() == [
        0,
        0,
        0.5,
        1,
        1,
    ]
    falling = [(step, 1 - weight) for step, weight in rising]
    mixed = Mixture([rising, falling], 8, seed, [None, None])
    assert mixed.sequences_before(100).tolist() == [0, 800]
    assert mixed.sequences_before(500)[0] - mixed.sequences_before(300)[0] == 1600
    assert abs(mixed.sequences_before(300)[0] - 800) <= 25


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_a_source_stops_at_its_limit_and_the_others_take_its_share(chunk, seed, monkeypatch):
    monkeypatch.setattr(mixture, "STEPS_PER_CHUNK", chunk)
    mixed = Mixture(constant(0.5, 0.25, 0.25), 8, seed, [100, None, None])
    assert 100 - 4 < mixed.sequences_before(400)[0] <= 100
    assert mixed.sequences_before(400).sum() == 3200
    late = mixed.sequences_before(400) - mixed.sequences_before(300)
    assert late.tolist() == pytest.approx([0, 400, 400], abs=2)


def test_when_nothing_is_left_the_step_is_named(seed):
    mixed = Mixture(constant(0.5, 0.5), 8, seed, [40, 20])
    with pytest.raises(
        UserError,
        match="no source has anything left at step (6|7|8): "
        "raise max_epochs or lower training.steps",
    ):
        mixed.sequences_before(50)


def test_uniform_numbers_are_uniform_and_independent(seed):
    x = uniform(seed, 0, np.arange(100_000))
    y = uniform(seed, 1, np.arange(100_000))
    for sample in (x, y):
        assert abs(sample.mean() - 0.5) < 0.01
        assert abs(np.histogram(sample, 10, (0, 1))[0] / 100_000 - 0.1).max() < 0.01
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.02
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 0.02
