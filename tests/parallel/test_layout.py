"""The arithmetic of layouts, against Megatron's order of ranks and by enumeration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitlm_dist.config_loading import load_config
from bitlm_dist.errors import UserError
from bitlm_dist.parallel.config import ParallelConfig
from bitlm_dist.parallel.layout import (
    ParallelLayout,
    build_layout,
    local_model_chunks,
    resolve_micro_batch_size,
    split_layers,
)

SIZES = st.integers(1, 4)


@given(SIZES, SIZES, SIZES, SIZES)
def test_ranks_count_tensor_then_context_then_data_then_pipeline(tensor, context, data, pipeline):
    expected = [
        (p, d, c, t)
        for p in range(pipeline)
        for d in range(data)
        for c in range(context)
        for t in range(tensor)
    ]
    sizes = {"tensor": tensor, "context": context, "data": data, "pipeline": pipeline}
    layouts = [
        ParallelLayout(**sizes, rank=rank) for rank in range(tensor * context * data * pipeline)
    ]
    assert [
        (x.pipeline_rank, x.data_rank, x.context_rank, x.tensor_rank) for x in layouts
    ] == expected


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_context_ranks_hold_every_position_once_in_whole_blocks(context, pieces, block):
    length = 2 * context * pieces * block
    layouts = [ParallelLayout(context=context, rank=rank) for rank in range(context)]
    held = [layout.local_positions(length) for layout in layouts]
    together = torch.cat(held)

    assert sorted(together.tolist()) == list(range(length))
    assert torch.equal(together[layouts[0].gather_order(length)], torch.arange(length))
    for positions in held:
        assert (positions.unflatten(0, (-1, block))[:, 0] % block == 0).all()
        assert (positions.unflatten(0, (-1, block)).diff(dim=1) == 1).all()


@pytest.mark.parametrize("context", [2, 3, 4])
def test_causal_work_is_the_same_on_every_context_rank(context):
    length = 24 * context
    work = {
        int((ParallelLayout(context=context, rank=rank).local_positions(length) + 1).sum())
        for rank in range(context)
    }
    assert len(work) == 1


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 12), st.floats(0, 5))
def test_stages_hold_every_layer_once_and_in_order(pipeline, virtual, more, weight):
    layers = pipeline * virtual + more
    counts = split_layers(layers, pipeline * virtual, weight)
    assert sum(counts) == layers
    assert min(counts) >= 1

    found = {}
    for rank in range(pipeline):
        for stage in local_model_chunks(
            counts, ParallelLayout(pipeline=pipeline, virtual_pipeline=virtual, rank=rank)
        ):
            found[stage.vp_stage * pipeline + rank] = stage

    assert [layer for number in sorted(found) for layer in found[number].layer_range] == list(
        range(layers)
    )
    assert [found[number].is_first for number in sorted(found)].count(True) == 1
    assert found[0].is_first
    assert found[len(found) - 1].is_last


def test_the_last_stage_has_room_for_the_head():
    assert split_layers(8, 2, 0.0) == [4, 4]
    assert split_layers(8, 2, 4.0) == [6, 2]
    assert split_layers(8, 4, 2.0) == [3, 2, 2, 1]


REFUSED = [
    (
        {"tensor": 2},
        3,
        "3 processes were started, and parallel.tensor = 2 .* needs a multiple of 2: "
        "start 2 or 4, or change a key",
    ),
    (
        {"tensor": 2, "pipeline": 2},
        1,
        "1 process was started, .* needs a multiple of 4: start 4, or",
    ),
    (
        {"data": 3},
        1,
        "1 process was started, .* x parallel.data = 3 needs 3: start 3, or change a key",
    ),
    (
        {"optimizer_shard_ranks": 4, "context": 2},
        6,
        "parallel.optimizer_shard_ranks = 4 does not divide the 6 replicas .*: try 3",
    ),
    (
        {"head": {"engine": "fsdp2", "shard_ranks": 5}, "tensor": 2},
        8,
        "parallel.head.shard_ranks = 5 does not divide the 8 ranks of the last .*: try 4",
    ),
]


def test_instances_of_the_optimizer_are_groups_of_consecutive_replicas():
    sizes = ParallelConfig(tensor=2, optimizer_shard_ranks=2)
    layouts = [build_layout(sizes, 12, rank) for rank in range(12)]
    assert {layout.num_optimizer_instances for layout in layouts} == {3}
    assert [layout.optimizer_shard_rank for layout in layouts] == [0, 0, 1, 1] * 3
    assert [layout.is_first_instance for layout in layouts] == [True] * 4 + [False] * 8

    # fewer replicas than that shard it as before
    assert build_layout(sizes, 2, 0).num_optimizer_instances == 1
    assert build_layout(ParallelConfig(tensor=2), 12, 0).num_optimizer_shards == 6


@pytest.mark.parametrize(("sizes", "world", "message"), REFUSED)
def test_a_layout_that_does_not_fit_names_keys_and_what_would(sizes, world, message):
    with pytest.raises(UserError, match=message):
        build_layout(ParallelConfig(**sizes), world, 0)


@pytest.mark.parametrize(
    ("overrides", "layout", "message"),
    [
        (
            [],
            ParallelLayout(data=3),
            "8 sequences, which 3 data-parallel ranks cannot share: try 2304",
        ),
        (
            ["--parallel.micro_batch_size", "3"],
            ParallelLayout(),
            "parallel.micro_batch_size = 3 does not divide the 8 sequences per step of a "
            "data-parallel rank: try 2",
        ),
        (
            ["--parallel.micro_batch_size", "8"],
            ParallelLayout(pipeline=2, virtual_pipeline=2),
            "a multiple of parallel.pipeline = 2 microbatches per step, not 1: change",
        ),
    ],
)
def test_a_batch_that_cannot_be_shared_names_what_could(overrides, layout, message):
    config = load_config(
        None,
        ["--data.sequence_length", "256", "--training.global_batch_tokens", "2048", *overrides],
    ).config
    with pytest.raises(UserError, match=message):
        resolve_micro_batch_size(config, layout)
