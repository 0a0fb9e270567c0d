"""What the ranks of test_zero_head.py do: train with a sharded head and look at it from inside."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from parity import SEQUENCES, TINY, V, batch_of, done, train

from bitlm_dist.codes import BitCodes, natural
from bitlm_dist.config import SamplingConfig
from bitlm_dist.config_loading import load
from bitlm_dist.inference.generate import generate_blocks
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.language_model import target_mask
from bitlm_dist.parallel.fsdp_head import FsdpHead
from bitlm_dist.parallel.layout import layout_of
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.sharded_head import ShardedHead

WORLD_CALLS: list[str] = []  # collectives of the whole job that DeepSpeed entered


def watch_collectives() -> None:
    """Note every collective of torch.distributed that code of DeepSpeed calls for the whole job."""
    for name in ("barrier", "broadcast", "all_reduce", "all_gather", "all_gather_object", "broadcast_object_list", "new_group"):
        plain = getattr(dist, name)

        def noted(*args: Any, _plain: Any = plain, _name: str = name, **named: Any) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            whole = named.get("group") in (None, dist.group.WORLD) and not any(isinstance(a, dist.ProcessGroup) for a in args)
            if f"{os.sep}deepspeed{os.sep}" in caller and whole:
                WORLD_CALLS.append(_name)
            return _plain(*args, **named)

        setattr(dist, name, noted)


def engine_of(overrides: list[str]) -> Engine:
    config = load(None, [*TINY, *overrides]).config
    layout = layout_of(config.parallel, int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    return Engine(config, BitCodes(natural(V), 9), eos=1, layout=layout)


def steps(engine: Engine, first: int, count: int) -> list[tuple[float, float, bool]]:
    share, found = SEQUENCES // engine.layout.data, []
    for step in range(first, first + count):
        update = engine.step(batch_of(step, engine.layout.data_rank * share, share), step)
        found.append((float(update.loss), update.norm, update.made))
    return found


def run(parity: dict[str, list[str]], inside: dict[str, list[str]]) -> dict[str, Any]:
    """Losses and parameters of some cases, what :func:`look` sees of others, and whether this rank met DeepSpeed in each."""
    watch_collectives()
    found: dict[str, Any] = {"met": {}}
    for case, overrides in {**parity, **inside}.items():
        found[case] = train(overrides)[:2] if case in parity else look(overrides)
        found["met"][case] = "deepspeed" in sys.modules
        done()
    return {**found, "world calls": WORLD_CALLS}


def look(overrides: list[str]) -> dict[str, Any]:
    """Bytes of the head on this rank, blocks that it denoised, and what a step does whose norm is not finite."""
    engine = engine_of(overrides)
    head = engine.head
    assert isinstance(head, ShardedHead)
    found: dict[str, Any] = {"blocks": count_blocks(engine), "bytes": bytes_of(engine)}
    saved = [{n: [s.tensor.clone() for s in t.slices] for n, t in part.items()} for part in (engine.weights(), engine.state())]
    found["expected"] = steps(engine, 3, 1)[0]
    live = engine.weights(), engine.state()
    for tensors, old in zip(live, saved, strict=True):
        for name, tensor in tensors.items():
            for piece, value in zip(tensor.slices, old[name], strict=True):
                piece.tensor.copy_(value)
    engine.restore(live[1])
    before = head.consolidated()
    plain, engine.optimizers.squares = engine.optimizers.squares, lambda: float("nan")  # type: ignore[method-assign]
    skipped = steps(engine, 2, 1)
    engine.optimizers.squares = plain  # type: ignore[method-assign]
    found["skipped"] = not skipped[0][2] and all(torch.equal(before[n], t) for n, t in head.consolidated().items())
    found["went on"] = steps(engine, 3, 1)[0]
    found["moved"] = any(not torch.equal(before[n], t) for n, t in head.consolidated().items())
    found["poisoned"] = poisoned(engine)
    found["written"] = written(engine)
    return found


def written(engine: Engine) -> list[list[int]]:
    """Blocks that a rank with the whole model writes, its head put together for that."""
    if engine.layout.model > 1:
        return []
    with engine.evaluating() as model:
        sampling = SamplingConfig(sampler="ode", steps=2)
        return list(generate_blocks(model, [5, 6], bos=0, blocks=2, sampling=sampling, seed=3, cached=False))


def poisoned(engine: Engine) -> tuple[bool, bool]:
    """A loss that is not a number: whether nothing moved, and whether the next step was made."""
    assert engine.head is not None
    model, before = engine.chunks[-1], engine.head.consolidated()
    if isinstance(model, BitLM) and model.place.stage.predicts:
        plain = model.head_loss
        model.head_loss = lambda *arguments: plain(*arguments) * float("nan")
    made = steps(engine, 4, 1)[0][2]
    if isinstance(model, BitLM) and model.place.stage.predicts:
        model.head_loss = plain
    same = all(torch.equal(before[n], t) for n, t in engine.head.consolidated().items())
    return same and not made, steps(engine, 5, 1)[0][2]


def count_blocks(engine: Engine) -> tuple[int, int]:
    """Blocks that this rank denoised in a step, and target blocks of the whole batch."""
    model, seen = engine.chunks[-1], []
    if model.place.stage.predicts:
        assert isinstance(model, BitLM)
        plain = model.head_loss

        def counted(context: torch.Tensor, *rest: Any) -> torch.Tensor:
            seen.append(len(context))
            return plain(context, *rest)

        model.head_loss = counted
    steps(engine, 0, 1)
    whole = target_mask(batch_of(0, 0, SEQUENCES), model.block_size, model.eos)
    return sum(seen), int(whole.unflatten(1, (-1, model.block_size)).any(-1).sum())


def bytes_of(engine: Engine) -> dict[str, int] | None:
    """Bytes of the head's weights, gradients (between two microbatches), and optimizer state with fp32 weights of its own."""
    assert engine.head is not None
    inside: Any = engine.head.engine
    if inside is None:
        steps(engine, 1, 1)
        return None
    grads: list[int] = []
    plain = inside.begin

    def measured(last: bool) -> None:
        if last:
            parts = _gradients(inside)
            grads.append(sum(g.numel() * g.element_size() for g in parts))
        plain(last)

    inside.begin = measured
    steps(engine, 1, 1)
    inside.begin = plain
    parameters = [*engine.chunks[-1].head.parameters()]  # type: ignore[union-attr]
    local = [getattr(p, "ds_tensor", p) if p.numel() == 0 else p for p in parameters]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in local]
    state = [value for _, slots in engine.head._parts() for value in slots.values()]
    masters = [p.flat for p in inside.partitions()]
    separate = {p.untyped_storage().data_ptr() for p in local}
    state += [flat for flat in masters if flat.untyped_storage().data_ptr() not in separate]
    return {
        "weights": sum(p.numel() * p.element_size() for p in local),
        "gradients": grads[0],
        "state": sum(t.numel() * t.element_size() for t in state),
        "numbers": sum(piece.shape.numel() for p in inside.partitions() for piece in p.pieces),
    }


def _gradients(inside: Any) -> list[torch.Tensor]:
    """What an engine holds of the microbatches so far."""
    if isinstance(inside, FsdpHead):
        return [p.grad.to_local() for p in inside._named.values() if p.grad is not None]
    held = [getattr(p, name, None) for p in inside._names for name in ("grad", "grad_accum")]
    if inside.stage == 2:
        for kept in (inside._zero.averaged_gradients, inside._zero.all_grad_tensors):
            held += [g for part in kept.values() for g in part or ()]
    if inside.stage == 3:
        held.append(inside._zero.grad_partitions_flat_buffer)
    return [*{g.data_ptr(): g for g in held if g is not None}.values()]
