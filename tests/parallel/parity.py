"""Rank code of test_parity.py: train under a layout, report losses, norms and full parameters."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ranks import run_command_line
from torch import Tensor

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.config_loading import load_config
from bitlm_dist.model.batch import Batch
from bitlm_dist.model.initialization import global_named_parameters, unshard
from bitlm_dist.parallel import mesh, partition
from bitlm_dist.parallel.layout import ParallelLayout, build_layout
from bitlm_dist.training import engine as engine_module
from bitlm_dist.training.engine import Engine

# small, so that the exchange of a tiny model's matrices takes several rounds
partition.ROUND_NUMEL = 10_000
V = 300
LENGTH = 64
NUM_SEQUENCES = 8
NUM_STEPS = 6
OVERLAPPING = "overlapping"  # a word of a case's overrides, see overlapped_communication
SMALL_BUCKET = 20_000  # elements
TINY = [
    *(
        "--data.sequence_length",
        str(LENGTH),
        "--training.global_batch_tokens",
        str(LENGTH * NUM_SEQUENCES),
    ),
    *(
        "--model.backbone.num_layers",
        "4",
        "--model.backbone.hidden_size",
        "64",
        "--model.backbone.num_heads",
        "4",
    ),
    *("--model.backbone.head_dim", "16", "--model.backbone.ffn_hidden_size", "96"),
    *(
        "--head.hidden_size",
        "32",
        "--head.num_layers",
        "2",
        "--optimizer.warmup_steps",
        "1",
        "--training.steps",
        "10",
    ),
]


def make_batch(step: int, first: int, num_sequences: int) -> Batch:
    """Sequences first..first+num_sequences-1 of a step's global batch.

    Each has three documents, as packing would place them.
    """
    tokens = torch.randint(
        2, V, (NUM_SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step)
    )
    ids = torch.tensor([0] * 20 + [1] * 24 + [2] * 20).expand(NUM_SEQUENCES, -1)
    rows = slice(first, first + num_sequences)
    return Batch(tokens[rows], ids[rows], torch.arange(NUM_SEQUENCES)[rows] + NUM_SEQUENCES * step)


@contextmanager
def overlapped_communication() -> Iterator[None]:
    """Build engines whose communication overlaps with compute, as on GPUs, in small buckets."""
    plain = engine_module._ddp_config

    def overlapping(layout: ParallelLayout, is_optimizer_sharded: bool) -> Any:
        config = plain(layout, is_optimizer_sharded)
        assert not config.overlap_grad_reduce
        return replace(
            config,
            overlap_grad_reduce=True,
            overlap_param_gather=is_optimizer_sharded,
            bucket_size=SMALL_BUCKET,
        )

    with mock.patch.object(engine_module, "_ddp_config", overlapping):
        yield


def train(
    overrides: list[str],
) -> tuple[list[tuple[float, float]], dict[str, Tensor], tuple[int, ...]]:
    """Train ``NUM_STEPS`` steps.

    Returns:
        Loss and gradient norm of each step; the full parameters after the last one, on rank 0
        only; the largest numbers of bytes that a rank holds, see :func:`_memory_bytes`.
    """
    overlapping = OVERLAPPING in overrides
    overrides = [word for word in overrides if word != OVERLAPPING]
    config = load_config(None, [*TINY, *overrides]).config
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    layout = build_layout(config.parallel, world_size, rank)
    with overlapped_communication() if overlapping else nullcontext():
        engine = Engine(config, BitCodes(natural_codes(V), 9), eos=1, layout=layout)
    num_local_sequences = NUM_SEQUENCES // layout.data
    finder = engine.target_finder()
    found = []

    for step in range(NUM_STEPS):
        batch = make_batch(step, layout.data_rank * num_local_sequences, num_local_sequences)
        update = engine.train_step(finder.find_all(batch).to(mesh.device()), step)
        found.append((float(update.loss), float(update.grad_norm)))

    engine.model_state_dict()  # weights that are still on their way arrive
    local_params = {
        n: p.detach().cpu().clone()
        for c in engine.chunks
        for n, p in global_named_parameters(c, c.pipeline_stage.model_chunk.layer_range.start)
    }
    if engine.sharded_head is not None:
        local_params |= {
            n: whole.cpu() for n, whole in engine.sharded_head.full_state_dict().items()
        }

    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, (layout, local_params))
    sizes: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(sizes, _memory_bytes(engine))
    reset_process_groups()
    return (
        found,
        _full_params(gathered) if rank == 0 else {},
        tuple(map(max, zip(*sizes, strict=True))),
    )


def _memory_bytes(engine: Engine) -> tuple[int, int, int]:
    """Bytes of this rank's parameters, gradient buffers and optimizer state.

    The gradient buffers of a sharded head are not counted.
    """
    head_partitions = engine.sharded_head.partitions if engine.sharded_head else []
    slots = [
        tensor for partition in engine.optimizer.partitions for tensor in partition.state.values()
    ]
    # master weights of the backbone, and ZeRO's fp32 weights
    slots += [
        partition.flat
        for partition in engine.optimizer.partitions
        if partition.weight_dtype != torch.float32 or partition in head_partitions
    ]

    buffers = [buffer.grad_data for wrapped in engine._ddp_chunks for buffer in wrapped.buffers]
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    return tuple(
        sum(t.numel() * t.element_size() for t in part) for part in (parameters, buffers, slots)
    )  # type: ignore[return-value]


def _full_params(gathered: list[Any]) -> dict[str, Tensor]:
    """Join the shards of tensor ranks; replicas must be equal."""
    full: dict[str, Tensor] = {}
    for name in {n for _, own in gathered for n in own}:
        holders = [(layout, own[name]) for layout, own in gathered if name in own]
        shards = [
            [tensor for layout, tensor in holders if layout.tensor_rank == rank]
            for rank in range(holders[0][0].tensor)
        ]

        for copies in shards:
            assert all(torch.equal(copies[0], copy) for copy in copies), (
                f"ranks disagree about {name}"
            )
        full[name] = unshard(name, [copies[0] for copies in shards])

    return full


def receptive_fields(overrides: list[str], queries: list[int]) -> dict[int, list[int]]:
    """Input positions on which the hidden state at each of ``queries`` depends, over all ranks."""
    config = load_config(None, [*TINY, *overrides]).config
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    layout = build_layout(config.parallel, world_size, rank)
    chunk = Engine(config, BitCodes(natural_codes(V), 9), eos=1, layout=layout).chunks[0]
    batch = make_batch(0, 0, 1)
    found = {}
    local_positions = (
        layout.local_head_positions(layout.local_positions(LENGTH))
        if layout.sequence
        else layout.local_positions(LENGTH)
    )

    for query in queries:
        full_embeddings = torch.randn(LENGTH, 1, 64, generator=torch.Generator().manual_seed(query))
        embedded = full_embeddings[local_positions].requires_grad_()
        states = chunk.local_hidden_states(chunk.backbone(embedded, batch.document_ids, LENGTH))
        positions = chunk.state_positions(LENGTH)
        states[:, positions == query].square().sum().add(0 * states.sum()).backward()
        gathered: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(
            gathered, local_positions[(embedded.grad != 0).any(-1).any(-1)].tolist()
        )
        found[query] = sorted({position for part in gathered for position in part})

    reset_process_groups()
    return found


def reach_all(cases: dict[str, list[str]], queries: list[int]) -> dict[str, dict[int, list[int]]]:
    """:func:`receptive_fields` for every case."""
    return {name: receptive_fields(overrides, queries) for name, overrides in cases.items()}


def train_all(cases: dict[str, list[str]]) -> dict[str, Any]:
    """Every case in turn, in one process: importing Megatron takes longer than training."""
    return {name: train(overrides) for name, overrides in cases.items()}


def reset_process_groups() -> None:
    """Destroy this case's groups and their threads, so that the next can have another layout."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if "deepspeed" in sys.modules:
        # ranks compare this counter at stage 3, but only those of an earlier case's last stage have
        # advanced it
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[-1][0] = 0
        _kept_groups.add(mesh._head_group)  # DeepSpeed goes on with the first that it met

    gc.collect()  # an engine is a circle, and it has groups
    for group in [*torch.distributed.distributed_c10d._world.pg_map]:
        if group not in _kept_groups | {torch.distributed.group.WORLD}:
            torch.distributed.destroy_process_group(group)


_kept_groups: set[Any] = set()


def fit_in_turn(file: str, jobs: list[tuple[list[str], int]]) -> None:
    """Run `bitlm train` with each set of overrides up to a step, each on its own layout."""
    from bitlm_dist.training.trainer import Trainer

    for overrides, until in jobs:
        config = load_config(Path(file), overrides).config
        layout = build_layout(
            config.parallel, int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        )
        trainer = Trainer.build(config, layout=layout).open()
        trainer.fit(until=until)
        trainer.close()
        torch.distributed.barrier()  # the folder is free when the next one begins
        reset_process_groups()


def fail(failed: int, where: str, words: list[str]) -> None:
    """Run `bitlm` with a rank that fails while the others wait for it.

    It fails in a collective, or where the head starts a microbatch.
    """

    def burn(*ignored: Any, **named: Any) -> None:
        if torch.distributed.get_rank() == failed:
            raise RuntimeError(f"{where} on fire")

    def app(**settings: Any) -> None:
        torch.distributed.init_process_group("gloo")
        burn()
        torch.distributed.all_reduce(torch.zeros(1))

    if where == "head":
        from bitlm_dist.training.partitioners.deepspeed import DeepSpeedPartitioner

        DeepSpeedPartitioner.start_microbatch = burn  # type: ignore[method-assign]
    else:
        import bitlm_dist.cli

        bitlm_dist.cli.app = app  # type: ignore[assignment]

    run_command_line(words)
