"""Run cases on fake GPUs: `python fake_ranks.py CASES.json FOLDER`.

A case is a name, a function of this file and its arguments. Its result is pickled to
FOLDER/NAME.pickle, its output goes to FOLDER/NAME.log. Each case is forked from a process that has
imported everything.
"""

import gc
import io
import json
import os
import pickle
import sys
import traceback
from collections import Counter
from contextlib import redirect_stderr
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(OMP_NUM_THREADS="1", LOCAL_RANK="0")

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bitlm_dist.compilation import enable_compiled_regions
from bitlm_dist.config_loading import load_config
from bitlm_dist.data_prep.token_bytes import ByteLengths
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.model.fused_regions import add_and_norm
from bitlm_dist.parallel import mesh
from bitlm_dist.planning.fake_cuda import fake_gpu
from bitlm_dist.planning.step_trace import KernelSource, StepTrace, Tracer
from bitlm_dist.planning.trace import trace_rank, trace_steps
from bitlm_dist.training.optimizer import Optimizer

VOCABULARY = 300


def steps(
    words: list[str],
    config: str | None,
    world: int,
    rank: int,
    vocabulary: int = VOCABULARY,
    count: int = 2,
) -> dict[str, Any]:
    """Trace training steps; all steps after the second are like it."""
    loaded = load_config(Path(config) if config else None, words).config
    return summary(trace_steps(loaded, world, rank, vocabulary, count))


def optimizer_step(words: list[str], config: str, world: int, rank: int) -> dict[str, Any]:
    """Trace a step of a preset, of which the optimizer's part is a phase of its own."""
    tracers: list[Tracer] = []
    enter = Tracer.__enter__
    update = Optimizer.clip_and_step

    def entered(tracer: Tracer) -> Tracer:
        tracers.append(tracer)
        return enter(tracer)

    def updated(optimizer: Optimizer, lr_multiplier: float) -> Any:
        tracers[0].start_phase("optimizer")
        result = update(optimizer, lr_multiplier)
        tracers[0].start_phase("after")
        return result

    loaded = load_config(Path(config), words).config
    with (
        mock.patch.object(Tracer, "__enter__", entered),
        mock.patch.object(Optimizer, "clip_and_step", updated),
    ):
        return summary(trace_steps(loaded, world, rank))


def command(words: list[str], world: int = 1, rank: int = 0) -> dict[str, Any]:
    """Trace a `bitlm` command, including its command line."""
    from bitlm_dist.__main__ import main

    sys.argv = ["bitlm", *words]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))

    # ids that are copied to the host are zeros, and the real token 0 has no bytes
    ones = np.ones(VOCABULARY, dtype=np.int64)
    lengths = mock.patch.object(Tokenizer, "byte_lengths", ByteLengths(ones, ones))
    with (
        lengths,
        trace_rank(world, rank, build_fake=False) as tracer,
        pytest.raises(SystemExit) as ended,
    ):
        main()
        assert not dist.is_initialized(), "the process group was left to itself"
    assert not ended.value.code, f"exit code {ended.value.code}"
    return summary(tracer.trace)


def refusal(words: list[str], world: int, memory_bytes: int) -> str:
    """What `bitlm` says on a GPU with so much memory that it does not begin."""
    from bitlm_dist.__main__ import main

    sys.argv = ["bitlm", *words]
    os.environ.update(RANK="0", WORLD_SIZE=str(world))
    message = io.StringIO()
    with (
        fake_gpu(world, 0, memory_bytes=memory_bytes),
        redirect_stderr(message),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert ended.value.code == 2, message.getvalue()
    return message.getvalue()


def region(rows: int, width: int) -> dict[str, Any]:
    """Trace forward and backward of a compiled region and a matrix product."""
    with trace_rank(1, 0, build_fake=False) as tracer, enable_compiled_regions():
        x, branch = (torch.empty(rows, width, device="cuda", requires_grad=True) for _ in range(2))
        weight, matrix = (
            torch.empty(*shape, device="cuda", requires_grad=True)
            for shape in ((width,), (width, width))
        )

        tracer.start_phase("step 0")
        total, normed = add_and_norm(x, branch, weight)
        forward_bytes = tracer.trace.peak_bytes["step 0"]
        torch.autograd.backward(
            (total, normed @ matrix), (torch.empty_like(x), torch.empty_like(x))
        )

    def by_source(counts: Counter[KernelSource]) -> dict[tuple[str, bool], int]:
        return {(s.operator, s.is_backward): count for s, count in counts.items()}

    return {
        "kernels": by_source(tracer.trace.num_kernels["step 0"]),
        "bytes": by_source(tracer.trace.hbm_bytes["step 0"]),
        "allocated": forward_bytes - tracer.trace.static_bytes["build"],
        "peak": {},
    }


def summary(trace: StepTrace) -> dict[str, Any]:
    """Plain values for the tests to compare; without line numbers, which every edit changes."""
    waits = {
        phase: Counter({f"{p.file} {p.function}: {p.reason}": 0 for p in counted})
        for phase, counted in trace.waits.items()
    }
    for phase, counted in trace.waits.items():
        for p, count in counted.items():
            waits[phase][f"{p.file} {p.function}: {p.reason}"] += count
    return {
        "waits": {phase: dict(sorted(counted.items())) for phase, counted in waits.items()},
        "collectives": {
            phase: dict(sorted(Counter(f"{c.operator} over {c.group}" for c in sent).items()))
            for phase, sent in trace.collectives.items()
        },
        "sent": {
            phase: [tuple(asdict(c).values()) for c in sent]
            for phase, sent in trace.collectives.items()
        },
        "static": dict(trace.static_bytes),
        "peak": dict(trace.peak_bytes),
        "flops": dict(trace.flops),
        "parameters": trace.parameter_shapes,
        "buffers": trace.buffer_bytes,
    }


def main() -> None:
    """Run the cases, one per core at a time."""
    cases = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(sys.argv[2])
    _import_all()
    running: set[int] = set()
    for case in cases:
        if len(running) >= len(os.sched_getaffinity(0)):
            running.remove(os.wait()[0])
        child = os.fork()
        if child == 0:
            _run(case, folder)
        running.add(child)
    while running:
        running.remove(os.wait()[0])


def _import_all() -> None:
    """Import everything with a fake GPU: Megatron-core and DeepSpeed look for CUDA on import."""
    torch.set_num_threads(1)
    with fake_gpu(1, 0):
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer
        from torch.distributed import checkpoint, fsdp  # noqa: F401

        import bitlm_dist.cli
        import bitlm_dist.cli.progress
        import bitlm_dist.training.trainer  # noqa: F401

        deepspeed.get_accelerator()
        mesh.device()
    gc.collect()

    # a trace runs the garbage collector often; it need not scan all of this each time
    gc.freeze()


def _run(case: dict[str, Any], folder: Path) -> None:
    log = os.open(folder / f"{case['name']}.log", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        found = globals()[case["function"]](*case["arguments"])
        (folder / f"{case['name']}.pickle").write_bytes(pickle.dumps(found))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
