import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.checkpoint.tensors import (
    INDEX,
    ShardEntry,
    assign_writers,
    index_text,
    load_full,
    load_shards,
    local_entries,
    read_index,
    write_safetensors,
)
from bitlm_dist.errors import UserError
from bitlm_dist.parallel.sharded_tensor import ShardedTensor

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(torch.Size)


def cut(data, wholes, ranks):
    """Split tensors into one range per rank, which may be empty.

    Returns:
        Each rank's tensors: [{name: ShardedTensor}].
    """
    held = [{} for _ in range(ranks)]
    for name, whole in wholes.items():
        cuts = sorted(
            data.draw(
                st.lists(st.integers(0, whole.numel()), min_size=ranks - 1, max_size=ranks - 1)
            )
        )
        ends = [0, *cuts, whole.numel()]
        for rank in range(ranks):
            flat = whole.flatten()[ends[rank] : ends[rank + 1]].clone()
            held[rank][name] = ShardedTensor.from_flat_range(whole.shape, ends[rank], flat)

    return held


def save(folder, held):
    """Write the files and the index, as the ranks of a job do."""
    entries = [local_entries(tensors) for tensors in held]
    shares = assign_writers([list(own) for own in entries])
    for rank, share in enumerate(shares):
        write_safetensors(
            folder / f"{rank}.safetensors", share, [entries[rank][entry] for entry in share]
        )

    (folder / INDEX).write_text(
        index_text({f"{rank}.safetensors": share for rank, share in enumerate(shares)})
    )


@given(st.lists(SHAPES, min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 4), st.data())
def test_what_some_ranks_save_other_ranks_load(tmp_path_factory, shapes, before, after, data):
    folder = tmp_path_factory.mktemp("any")
    wholes = {f"t{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    save(folder, cut(data, wholes, before))
    assert all(
        torch.equal(load_full(folder, name, read_index(folder)), whole)
        for name, whole in wholes.items()
    )

    for held in cut(data, wholes, after):
        expected = {n: [p.tensor.clone() for p in s.shards] for n, s in held.items()}
        for sliced in held.values():
            for part in sliced.shards:
                part.tensor.fill_(float("nan"))
        load_shards(folder, held)
        for name, sliced in held.items():
            assert all(
                torch.equal(p.tensor, e) for p, e in zip(sliced.shards, expected[name], strict=True)
            )


def test_files_are_safetensors_and_replicas_are_written_once(tmp_path):
    wholes = {
        "a": torch.randn(4, 6),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "s": torch.tensor(7.0),
    }
    held = {name: ShardedTensor.from_full(tensor) for name, tensor in wholes.items()}
    save(tmp_path, [held, held, held])

    found = {}
    for rank in range(3):
        found |= load_file(tmp_path / f"{rank}.safetensors")
    assert sum(len(load_file(tmp_path / f"{rank}.safetensors")) for rank in range(3)) == 3, (
        "each by one rank"
    )
    assert found.keys() == wholes.keys()
    assert all(torch.equal(found[name], whole) for name, whole in wholes.items())


def test_the_work_of_writing_is_spread():
    entries = [ShardEntry(f"t{i}", "F32", (10 * i,), (0,), (10 * i,)) for i in range(1, 9)]
    shares = assign_writers([entries, entries])
    assert sum(map(len, shares)) == 8
    loads = [sum(entry.sizes[0] for entry in share) for share in shares]
    assert abs(loads[0] - loads[1]) <= 10


def test_slices_that_leave_a_hole_are_a_mistake_of_ours():
    flat = torch.zeros(5)
    with pytest.raises(AssertionError, match="t do not cover it"):
        assign_writers(
            [list(local_entries({"t": ShardedTensor.from_flat_range(torch.Size((2, 3)), 0, flat)}))]
        )


def test_nothing_that_is_read_can_hold_code(tmp_path, monkeypatch):
    save(tmp_path, [{"a": ShardedTensor.from_full(torch.arange(6.0).view(2, 3))}])

    def refuse(*arguments, **settings):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert load_full(tmp_path, "a", read_index(tmp_path)).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save(tmp_path, [{"a": ShardedTensor.from_full(torch.zeros(2, 3))}])
    with pytest.raises(
        UserError,
        match=r"a has shape \(2, 3\), the model has \(3, 3\): it is a checkpoint of another model",
    ):
        load_shards(tmp_path, {"a": ShardedTensor.from_full(torch.zeros(3, 3))})

    with pytest.raises(UserError, match="d is missing"):
        load_shards(tmp_path, {"d": ShardedTensor.from_full(torch.zeros(1))})


def test_a_loader_that_leaves_tensors_aside_is_refused_and_has_loaded_nothing(tmp_path):
    names = [f"w{i}" for i in range(6)]
    save(tmp_path, [{name: ShardedTensor.from_full(torch.ones(2)) for name in names}])
    kept = {"w1": ShardedTensor.from_full(torch.zeros(2))}

    expected = "holds w0, w2, w3 and 2 more, which the model does not have: .* another model"
    with pytest.raises(UserError, match=expected):
        load_shards(tmp_path, kept)
    assert kept["w1"].full.tolist() == [0, 0]

    # A part is loaded only if it is named as one.
    load_shards(tmp_path, kept, {"w1": read_index(tmp_path)["w1"]})
    assert kept["w1"].full.tolist() == [1, 1]


def test_an_index_that_leaves_a_hole_is_refused(tmp_path):
    whole = torch.arange(6.0)
    save(
        tmp_path,
        [
            {"a": ShardedTensor.from_flat_range(whole.shape, 0, whole[:4])},
            {"a": ShardedTensor.from_flat_range(whole.shape, 4, whole[4:])},
        ],
    )
    monkey = tensor_files.json.loads((tmp_path / INDEX).read_text())
    monkey["a"]["slices"].pop()
    (tmp_path / INDEX).write_text(tensor_files.json.dumps(monkey))
    with pytest.raises(UserError, match="a is incomplete: index.json names"):
        load_full(tmp_path, "a", read_index(tmp_path))


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_lookaheads_of_single_positions_are_loaded_as_one_stack(
    tmp_path_factory, before, after, data
):
    """As 0.2.0 wrote them, from any number of ranks to any other."""
    folder = tmp_path_factory.mktemp("stack")
    stack = torch.arange(48.0).view(3, 4, 4)
    old = {f"model.head.lookahead.{i}.weight": part for i, part in enumerate(stack)}
    save(folder, cut(data, old, before))

    name = "model.head.lookahead.weight"
    for wanted in cut(data, {name: torch.zeros_like(stack)}, after):
        load_shards(folder, wanted, read_index(folder))
        for shard in wanted[name].shards:
            place = tuple(
                slice(first, first + size)
                for first, size in zip(shard.offsets, shard.tensor.shape, strict=True)
            )
            assert torch.equal(shard.tensor, stack[place])


def test_a_lookahead_without_a_position_is_refused(tmp_path):
    parts = {f"model.head.lookahead.{i}.weight": torch.ones(2, 2) for i in (1, 2)}
    save(tmp_path, [{name: ShardedTensor.from_full(part) for name, part in parts.items()}])
    with pytest.raises(UserError, match="lookahead.weight is incomplete"):
        load_full(tmp_path, "model.head.lookahead.weight", read_index(tmp_path))
