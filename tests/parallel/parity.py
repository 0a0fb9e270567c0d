"""What the ranks of test_parity.py do: train a few steps under a layout and report losses, norms and whole parameters."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
from ranks import command
from torch import Tensor

from bitlm_dist.codes import BitCodes, natural
from bitlm_dist.config_loading import load
from bitlm_dist.model.initialization import global_names, join
from bitlm_dist.model.language_model import Batch
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import layout_of
from bitlm_dist.training.distributed_adamw import DistributedAdamW
from bitlm_dist.training.engine import Engine

V, LENGTH, SEQUENCES, STEPS = 300, 64, 8, 6
TINY = [
    *("--data.sequence_length", str(LENGTH), "--training.global_batch_tokens", str(LENGTH * SEQUENCES)),
    *("--model.backbone.layers", "4", "--model.backbone.width", "64", "--model.backbone.heads", "4"),
    *("--model.backbone.head_width", "16", "--model.backbone.ffn_width", "96"),
    *("--head.width", "32", "--head.layers", "2", "--optimizer.warmup_steps", "1", "--training.steps", "10"),
]


def batch_of(step: int, first: int, count: int) -> Batch:
    """Sequences first..first+count-1 of a step's global batch: three documents in each, as packing would lay them."""
    tokens = torch.randint(2, V, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step))
    ids = torch.tensor([0] * 20 + [1] * 24 + [2] * 20).expand(SEQUENCES, -1)
    rows = slice(first, first + count)
    return Batch(tokens[rows], ids[rows], torch.arange(SEQUENCES)[rows] + SEQUENCES * step)


def train(overrides: list[str]) -> tuple[list[tuple[float, float]], dict[str, Tensor], tuple[int, ...]]:
    """-> losses and norms of each step; whole parameters after the last, on rank 0 (elsewhere: none); bytes that a rank holds."""
    config = load(None, [*TINY, *overrides]).config
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    layout = layout_of(config.parallel, world, rank)
    engine = Engine(config, BitCodes(natural(V), 9), eos=1, layout=layout)
    share, found = SEQUENCES // layout.data, []
    for step in range(STEPS):
        update = engine.step(batch_of(step, layout.data_rank * share, share).to(mesh.device()), step)
        found.append((float(update.loss), update.norm))
    own = {n: p.detach().cpu().clone() for c in engine.chunks for n, p in global_names(c, c.place.stage.layers.start)}
    if engine.head is not None:
        own |= {n: whole.cpu() for n, whole in engine.head.consolidated().items()}
    every: list[Any] = [None] * world
    torch.distributed.all_gather_object(every, (layout, own))
    sizes: list[Any] = [None] * world
    torch.distributed.all_gather_object(sizes, _held(engine))
    done()
    return found, _whole(every) if rank == 0 else {}, tuple(map(max, zip(*sizes, strict=True)))


def _held(engine: Engine) -> tuple[int, int, int]:
    """Bytes of this rank's parameters, gradient buffers without a sharded head's, and optimizer state."""
    optimizers: Any = engine.optimizers
    inner = [optimizers._inner.optimizer] if isinstance(optimizers, DistributedAdamW) else optimizers._optimizers
    slots = [tensor for optimizer in inner for state in optimizer.state.values() for tensor in state.values()]
    if isinstance(optimizers, DistributedAdamW):
        slots += [shard.flat for shard in optimizers._shards() if optimizers._named[shard.name].dtype != shard.flat.dtype]
    else:
        slots += optimizers._masters.values()
    if engine.head is not None and engine.head.engine is not None:
        slots += [value for _, state in engine.head._parts() for value in state.values()]
        slots += [partition.flat for partition in engine.head.engine.partitions()]  # ZeRO's fp32 weights
    buffers = [buffer.grad_data for wrapped in engine._wrapped for buffer in wrapped.buffers]
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    return tuple(sum(t.numel() * t.element_size() for t in part) for part in (parameters, buffers, slots))  # type: ignore[return-value]


def _whole(every: list[Any]) -> dict[str, Tensor]:
    """Join the shares of tensor ranks; ranks that should hold the same must."""
    whole: dict[str, Tensor] = {}
    for name in {n for _, own in every for n in own}:
        holders = [(layout, own[name]) for layout, own in every if name in own]
        shares = [[tensor for layout, tensor in holders if layout.tensor_rank == rank] for rank in range(holders[0][0].tensor)]
        for copies in shares:
            assert all(torch.equal(copies[0], copy) for copy in copies), f"ranks disagree about {name}"
        whole[name] = join(name, [copies[0] for copies in shares])
    return whole


def reach(overrides: list[str], queries: list[int]) -> dict[int, list[int]]:
    """Which input positions have a gradient of the state at each of ``queries``, over all ranks."""
    config = load(None, [*TINY, *overrides]).config
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    layout = layout_of(config.parallel, world, rank)
    chunk = Engine(config, BitCodes(natural(V), 9), eos=1, layout=layout).chunks[0]
    batch, found = batch_of(0, 0, 1), {}
    mine = layout.own(layout.positions(LENGTH)) if layout.sequence else layout.positions(LENGTH)
    for query in queries:
        whole = torch.randn(LENGTH, 1, 64, generator=torch.Generator().manual_seed(query))
        embedded = whole[mine].requires_grad_()
        states, positions = chunk.own_states(chunk.backbone(embedded, batch.document_ids, LENGTH), LENGTH)
        states[:, positions == query].square().sum().add(0 * states.sum()).backward()
        every: list[Any] = [None] * world
        torch.distributed.all_gather_object(every, mine[(embedded.grad != 0).any(-1).any(-1)].tolist())
        found[query] = sorted({position for part in every for position in part})
    done()
    return found


def reach_all(cases: dict[str, list[str]], queries: list[int]) -> dict[str, dict[int, list[int]]]:
    """:func:`reach` for every case."""
    return {name: reach(overrides, queries) for name, overrides in cases.items()}


def train_all(cases: dict[str, list[str]]) -> dict[str, Any]:
    """Every case in turn, in one process: importing Megatron takes longer than training."""
    return {name: train(overrides) for name, overrides in cases.items()}


def done() -> None:
    """Let the next case in this process have another layout, without the threads of this one's groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if "deepspeed" in sys.modules:
        # ranks compare these numbers at stage 3; those of an earlier case's last stage alone have counted on
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[-1][0] = 0
        _kept_groups.add(mesh._head_group)  # DeepSpeed goes on with the first that it met

    gc.collect()  # an engine is a circle, and it has groups
    for group in [*torch.distributed.distributed_c10d._world.pg_map]:
        if group not in _kept_groups | {torch.distributed.group.WORLD}:
            torch.distributed.destroy_process_group(group)


_kept_groups: set[Any] = set()


def fit_in_turn(file: str, jobs: list[tuple[list[str], int]]) -> None:
    """`bitlm train` with some overrides up to a step, one after the other, each on its layout of this job's ranks."""
    from bitlm_dist.training.trainer import Trainer

    for overrides, until in jobs:
        config = load(Path(file), overrides).config
        layout = layout_of(config.parallel, int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)))
        trainer = Trainer(config, layout=layout)
        trainer.fit(until=until)
        trainer.close()
        torch.distributed.barrier()  # the folder is free when the next one begins
        done()


def fail(failed: int, where: str, words: list[str]) -> None:
    """`bitlm` with a rank that fails while the others wait for it: in a collective, or where the head takes a microbatch."""

    def burn(*ignored: Any) -> None:
        if torch.distributed.get_rank() == failed:
            raise RuntimeError(f"{where} on fire")

    def app(**settings: Any) -> None:
        torch.distributed.init_process_group("gloo")
        burn()
        torch.distributed.all_reduce(torch.zeros(1))

    if where == "head":
        from bitlm_dist.parallel.zero_head import ZeroHead

        ZeroHead.begin = burn  # type: ignore[method-assign]
    else:
        import bitlm_dist.cli

        bitlm_dist.cli.app = app  # type: ignore[assignment]
    command(words)
