"""Trace of the real training step of one rank of N GPUs on a machine without GPUs: memory, FLOPs,
communication and waits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bitlm_dist.checkpoint.tensors import local_entries
from bitlm_dist.codes import BitCodes, natural_codes, num_bits_needed
from bitlm_dist.config import Config
from bitlm_dist.model.batch import Batch
from bitlm_dist.model.transformer_engine import without_fp8
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import build_layout, resolve_micro_batch_size
from bitlm_dist.planning.fake_cuda import GPU, fake_gpu
from bitlm_dist.planning.step_trace import StepTrace, Tracer
from bitlm_dist.training.agreement import Agreement, Flags
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.readback import Moment
from bitlm_dist.training.step_pipeline import StepPipeline, TimedBatch


@contextmanager
def trace_rank(world_size: int, rank: int, build_fake: bool) -> Iterator[Tracer]:
    """Run this process as one rank of ``world_size`` fake GPUs, and trace it.

    Args:
        world_size: number of ranks.
        rank: global rank.
        build_fake: make CPU tensors fake, too, while the model is built; so a model of any size
            needs no memory.

    Yields:
        The tracer.
    """
    with fake_gpu(world_size, rank) as fake, Tracer(fake, mesh.group_names, build_fake) as tracer:
        yield tracer


def trace_steps(
    config: Config, world_size: int, rank: int = 0, vocab_size: int = 151_936, num_steps: int = 1
) -> StepTrace:
    """Trace one rank: build the engine, train some steps, and collect the tensors of a checkpoint.

    As in training, a step is read after the next one was launched.

    Args:
        config: the checked config; regions that ``training.compile`` compiles are one kernel, and
            fp8 is treated as bf16.
        world_size: number of ranks.
        rank: global rank.
        vocab_size: number of tokens.
        num_steps: number of training steps.

    Returns:
        The trace, with the phases ``build``, ``step 0``, …, ``checkpoint``.

    Raises:
        UserError: layout and config do not fit, or no fake GPU can be simulated here.
    """
    config = without_fp8(config)
    layout = build_layout(config.parallel, world_size, rank)
    resolve_micro_batch_size(config, layout)
    codes = BitCodes(natural_codes(vocab_size), config.model.bits or num_bits_needed(vocab_size))

    with trace_rank(world_size, rank, build_fake=True) as tracer:
        engine = Engine(config, codes, eos=0, layout=layout, initialize=False)
        _record_sizes(tracer.trace, engine)

        pipeline = StepPipeline(engine, Agreement(Flags, layout))
        for step in range(num_steps):
            tracer.start_phase(f"step {step}")
            pipeline.launch(_local_batch(config, engine), step)
            if len(pipeline) > 1:
                pipeline.read()

        # a save waits for the last step, and copies these tensors to the host
        tracer.start_phase("checkpoint")
        pipeline.read()
        local_entries(
            {
                **engine.model_state_dict(),
                **{
                    f"optimizer.{name}": tensor
                    for name, tensor in engine.optimizer_state_dict().items()
                },
            }
        )

    return tracer.trace


def _record_sizes(trace: StepTrace, engine: Engine) -> None:
    """Record the parameters and buffers of this rank."""
    trace.parameter_shapes = {
        n: tuple(p.shape) for chunk in engine.chunks for n, p in chunk.named_parameters()
    }
    trace.buffer_bytes = {
        n: b.numel() * b.element_size() for chunk in engine.chunks for n, b in chunk.named_buffers()
    }


def _local_batch(config: Config, engine: Engine) -> TimedBatch:
    """Batch of one data-parallel rank, one document per sequence."""
    num_sequences = (
        config.training.global_batch_tokens // config.data.sequence_length // engine.layout.data
    )
    tokens = torch.zeros(num_sequences, config.data.sequence_length, dtype=torch.int64)
    batch = Batch(tokens, torch.zeros_like(tokens), torch.arange(num_sequences))
    batch = engine.target_finder().find_all(batch).to(GPU)
    return TimedBatch(batch, Moment.now(), wait_seconds=0.0)
