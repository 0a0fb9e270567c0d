"""Rank code of test_zero_head.py: train with a sharded head and inspect it."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from parity import NUM_SEQUENCES, TINY, V, make_batch, reset_process_groups, train

from bitlm_dist.codes import BitCodes, natural_codes
from bitlm_dist.config_loading import load_config
from bitlm_dist.inference.config import SamplingConfig
from bitlm_dist.inference.generate import generate_blocks
from bitlm_dist.model.batch import loss_mask
from bitlm_dist.model.bitlm import BitLM
from bitlm_dist.model.head_loss import HeadBatch
from bitlm_dist.parallel.layout import build_layout
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.partitioners.fsdp2 import FSDP2Partitioner

WORLD_CALLS: list[str] = []  # collectives of the whole job that DeepSpeed entered


def watch_collectives() -> None:
    """Record every collective of torch.distributed that DeepSpeed calls on the default group."""
    for name in (
        "barrier",
        "broadcast",
        "all_reduce",
        "all_gather",
        "all_gather_object",
        "broadcast_object_list",
        "new_group",
    ):
        plain = getattr(dist, name)

        def noted(*args: Any, _plain: Any = plain, _name: str = name, **named: Any) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            is_whole_job = named.get("group") in (None, dist.group.WORLD) and not any(
                isinstance(a, dist.ProcessGroup) for a in args
            )
            if f"{os.sep}deepspeed{os.sep}" in caller and is_whole_job:
                WORLD_CALLS.append(_name)
            return _plain(*args, **named)

        setattr(dist, name, noted)


def build_engine(overrides: list[str]) -> Engine:
    config = load_config(None, [*TINY, *overrides]).config
    layout = build_layout(config.parallel, int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))
    return Engine(config, BitCodes(natural_codes(V), 9), eos=1, layout=layout)


def train_steps(engine: Engine, first: int, num_steps: int) -> list[tuple[float, float, bool]]:
    num_local_sequences = NUM_SEQUENCES // engine.layout.data
    found = []
    for step in range(first, first + num_steps):
        update = engine.train_step(
            make_batch(step, engine.layout.data_rank * num_local_sequences, num_local_sequences),
            step,
        )
        found.append((float(update.loss), float(update.grad_norm), bool(update.applied)))

    return found


def run(parity: dict[str, list[str]], inside: dict[str, list[str]]) -> dict[str, Any]:
    """Run all cases.

    Returns:
        Losses and parameters of the cases in ``parity``, the report of :func:`inspect_engine` on
        those in ``inside``, and whether this rank imported DeepSpeed in each.
    """
    watch_collectives()
    found: dict[str, Any] = {"met": {}}
    for case, overrides in {**parity, **inside}.items():
        found[case] = train(overrides)[:2] if case in parity else inspect_engine(overrides)
        found["met"][case] = "deepspeed" in sys.modules
        reset_process_groups()
    return {**found, "world calls": WORLD_CALLS}


def inspect_engine(overrides: list[str]) -> dict[str, Any]:
    """Report the bytes of the head on this rank and the blocks that it denoised.

    The report also tells the effect of a step whose gradient norm is not finite.
    """
    engine = build_engine(overrides)
    head = engine.sharded_head
    assert head is not None

    found: dict[str, Any] = {"blocks": count_blocks(engine), "bytes": bytes_of(engine)}
    saved = [
        {n: [s.tensor.clone() for s in t.shards] for n, t in part.items()}
        for part in (engine.model_state_dict(), engine.optimizer_state_dict())
    ]
    found["expected"] = train_steps(engine, 3, 1)[0]
    live = engine.model_state_dict(), engine.optimizer_state_dict()

    for tensors, old in zip(live, saved, strict=True):
        for name, tensor in tensors.items():
            for piece, value in zip(tensor.shards, old[name], strict=True):
                piece.tensor.copy_(value)

    engine.load_state_dict(live[1])
    before = head.full_state_dict()
    backbone: Any = engine.optimizer.partitioners[0]
    plain = backbone.grad_norm_squared
    backbone.grad_norm_squared = lambda: torch.tensor(float("nan"))
    skipped = train_steps(engine, 2, 1)
    backbone.grad_norm_squared = plain
    found["skipped"] = not skipped[0][2] and all(
        torch.equal(before[n], t) for n, t in head.full_state_dict().items()
    )

    found["went on"] = train_steps(engine, 3, 1)[0]
    found["moved"] = any(not torch.equal(before[n], t) for n, t in head.full_state_dict().items())
    found["poisoned"] = step_with_nan_loss(engine)
    found["written"] = generate(engine)
    return found


def generate(engine: Engine) -> list[list[int]]:
    """Blocks sampled by a rank with the full model, for which its head is gathered."""
    if engine.layout.model_parallel_size > 1:
        return []
    with engine.full_model_in_eval_mode() as model:
        sampling = SamplingConfig(sampler="ode", steps=2)
        return list(
            generate_blocks(
                model, [5, 6], bos=0, num_blocks=2, sampling=sampling, seed=3, use_cache=False
            )
        )


def step_with_nan_loss(engine: Engine) -> tuple[bool, bool]:
    """Take a step whose loss is NaN.

    Returns:
        Whether no weight changed, and whether the next step was applied.
    """
    assert engine.sharded_head is not None
    model = engine.chunks[-1]
    before = engine.sharded_head.full_state_dict()
    if isinstance(model, BitLM) and model.pipeline_stage.model_chunk.is_last:
        plain = model.head_loss

        def poisoned(batch: HeadBatch) -> tuple[torch.Tensor, torch.Tensor]:
            loss, terms = plain(batch)
            return loss * float("nan"), terms

        model.head_loss = poisoned

    made = train_steps(engine, 4, 1)[0][2]
    if isinstance(model, BitLM) and model.pipeline_stage.model_chunk.is_last:
        model.head_loss = plain
    same = all(torch.equal(before[n], t) for n, t in engine.sharded_head.full_state_dict().items())
    return same and not made, train_steps(engine, 5, 1)[0][2]


def count_blocks(engine: Engine) -> tuple[int, int]:
    """Blocks that this rank denoised in a step, and target blocks of the whole batch."""
    model = engine.chunks[-1]
    seen = []
    if model.pipeline_stage.model_chunk.is_last:
        assert isinstance(model, BitLM)
        plain = model.head_loss

        def counted(batch: HeadBatch) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(int(batch.valid.any(-1).sum()))
            return plain(batch)

        model.head_loss = counted

    train_steps(engine, 0, 1)
    full_mask = loss_mask(make_batch(0, 0, NUM_SEQUENCES), model.block_size, model.eos)
    return sum(seen), int(full_mask.unflatten(1, (-1, model.block_size)).any(-1).sum())


def bytes_of(engine: Engine) -> dict[str, int] | None:
    """Bytes of the head on this rank: weights, gradients and optimizer state.

    Gradients are measured between two microbatches. Optimizer state includes separate fp32 weights.
    """
    assert engine.sharded_head is not None
    inside: Any = engine.sharded_head
    if not inside.partitions:
        train_steps(engine, 1, 1)
        return None

    grads: list[int] = []
    plain = inside.start_microbatch

    def measured(is_last: bool) -> None:
        if is_last:
            parts = _gradients(inside)
            grads.append(sum(g.numel() * g.element_size() for g in parts))
        plain(is_last)

    inside.start_microbatch = measured
    train_steps(engine, 1, 1)
    inside.start_microbatch = plain
    parameters = [*engine.chunks[-1].head.parameters()]  # type: ignore[union-attr]
    local = [getattr(p, "ds_tensor", p) if p.numel() == 0 else p for p in parameters]
    local = [p.to_local() if hasattr(p, "to_local") else p for p in local]
    state = [value for p in inside.partitions for value in p.state.values()]

    masters = [p.flat for p in inside.partitions]
    separate = {p.untyped_storage().data_ptr() for p in local}
    state += [flat for flat in masters if flat.untyped_storage().data_ptr() not in separate]
    return {
        "weights": sum(p.numel() * p.element_size() for p in local),
        "gradients": grads[0],
        "state": sum(t.numel() * t.element_size() for t in state),
        "numbers": sum(piece.shape.numel() for p in inside.partitions for piece in p.param_ranges),
    }


def _gradients(inside: Any) -> list[torch.Tensor]:
    """Gradients that an engine has accumulated over the microbatches so far."""
    if isinstance(inside, FSDP2Partitioner):
        return [p.grad.to_local() for p in inside._parameters.values() if p.grad is not None]
    grads = [getattr(p, name, None) for p in inside._names for name in ("grad", "grad_accum")]
    if inside.zero_stage == 2:
        for kept in (inside._zero.averaged_gradients, inside._zero.all_grad_tensors):
            grads += [g for part in kept.values() for g in part or ()]

    if inside.zero_stage == 3:
        grads.append(inside._zero.grad_partitions_flat_buffer)
    return [*{g.data_ptr(): g for g in grads if g is not None}.values()]
