from math import inf
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlm_dist.checkpoint import diff, store
from bitlm_dist.checkpoint.diff import compare_tensors, compare_train_states
from bitlm_dist.checkpoint.tensors import local_entries
from bitlm_dist.parallel.sharded_tensor import ShardedTensor


def save(root, tensors, **state):
    entries = local_entries(
        {name: ShardedTensor.from_full(tensor) for name, tensor in tensors.items()}
    )
    return store.save(root, 1, list(entries), entries.values(), state)


@given(st.integers(1, 7), st.integers(0, 2**20))
def test_differences_are_those_of_the_tensors(block, seed):
    """However few elements are in memory at once."""
    import tempfile
    from pathlib import Path

    generator = torch.Generator().manual_seed(seed)
    first = {
        "model.a": torch.randn(5, 3, generator=generator),
        "optimizer.a.step": torch.tensor(3.0),
    }
    second = {
        "model.a": first["model.a"] + (torch.rand(5, 3, generator=generator) > 0.7),
        "optimizer.a.step": torch.tensor(3.0),
    }

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(diff, "BLOCK_NUMEL", block):
        counts, found = compare_tensors(
            save(Path(folder) / "1", first), save(Path(folder) / "2", second)
        )

    assert counts == {"weights": 1, "step": 1}
    apart = second["model.a"].double() - first["model.a"].double()
    assert [d.name for d in found] == (["model.a"] if apart.any() else [])
    for d in found:
        assert d.largest == float(apart.abs().max())
        assert d.relative == pytest.approx(float(apart.norm() / first["model.a"].double().norm()))


def test_what_cannot_be_compared_is_named(tmp_path):
    a = save(
        tmp_path / "1",
        {
            "model.a": torch.zeros(2),
            "model.b": torch.zeros(2, 3),
            "model.n": torch.tensor(float("nan")),
        },
    )
    b = save(
        tmp_path / "2",
        {
            "model.b": torch.zeros(3, 2),
            "optimizer.c.ema": torch.zeros(1),
            "model.n": torch.tensor(1.0),
        },
    )
    _, found = compare_tensors(a, b)

    assert {d.name: d.note for d in found} == {
        "model.a": "only in the first",
        "model.b": "shape (2, 3) and (3, 2)",
        "optimizer.c.ema": "only in the second",
        "model.n": "",
    }
    assert all((d.largest, d.relative) == (inf, inf) for d in found)
    assert compare_tensors(a, a)[1] == [], "not a number is itself"


def test_states_are_compared_key_by_key(tmp_path):
    config = {"optimizer": {"adamw_lr": 0.1}, "training": {"steps": 3}}
    a = save(tmp_path / "1", {}, tokens=5, seconds=1.0, config=config)
    b = save(
        tmp_path / "2", {}, tokens=6, seconds=2.0, config={**config, "optimizer": {"adamw_lr": 0.2}}
    )
    assert compare_train_states(a, b) == {"optimizer.adamw_lr": (0.1, 0.2), "tokens": (5, 6)}
