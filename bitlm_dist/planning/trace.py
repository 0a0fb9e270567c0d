"""The real training step of one rank of N GPUs, on a machine without GPUs: what it holds, computes, sends and waits for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bitlm_dist.checkpoint.tensors import entries_of
from bitlm_dist.codes import BitCodes, bits_needed, natural
from bitlm_dist.config import Config
from bitlm_dist.model.language_model import Batch
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import check_batch, layout_of
from bitlm_dist.planning.fake_cuda import GPU, fake_gpu
from bitlm_dist.planning.step_trace import StepTrace, Tracer
from bitlm_dist.training.engine import Engine


@contextmanager
def traced(world: int, rank: int, build_fake: bool) -> Iterator[Tracer]:
    """While open, this process is a rank of ``world`` fake GPUs and the tracer sees what it does.

    Args:
        world, rank: of the job.
        build_fake: CPU tensors are fake too, so that a model of any size is built in no memory.
    """
    with fake_gpu(world, rank) as fake, Tracer(fake, mesh.group_names, build_fake) as tracer:
        yield tracer


def trace_steps(config: Config, world: int, rank: int = 0, vocabulary: int = 151_936, steps: int = 1) -> StepTrace:
    """Build model, engine and optimizers of a rank, take some steps on its share of a global batch, collect what a save copies.

    Args:
        config: checked; ``training.compile`` is taken to be ``never``, as torch compiles nothing on fake tensors.
        world, rank: of the job.
        vocabulary: tokens.
        steps: ``step 0``, … in the result, between ``build`` and ``checkpoint``.

    Raises:
        UserError: layout and config do not fit, or no fake GPU can be made here.
    """
    config = config.model_copy(update={"training": config.training.model_copy(update={"compile": "never"})})
    layout = layout_of(config.parallel, world, rank)
    check_batch(config, layout)
    codes = BitCodes(natural(vocabulary), config.model.bits or bits_needed(vocabulary))

    with traced(world, rank, build_fake=True) as tracer:
        engine = Engine(config, codes, eos=0, layout=layout)
        tracer.found.parameters = {n: tuple(p.shape) for chunk in engine.chunks for n, p in chunk.named_parameters()}
        tracer.found.buffers = {n: b.numel() * b.element_size() for chunk in engine.chunks for n, b in chunk.named_buffers()}
        for step in range(steps):
            tracer.begin(f"step {step}")
            engine.step(_batch(config, layout.data), step)
        tracer.begin("checkpoint")
        entries_of({**engine.weights(), **{f"optimizer.{name}": tensor for name, tensor in engine.state().items()}})
    return tracer.found


def _batch(config: Config, data_ranks: int) -> Batch:
    """A data rank's share, one document a sequence."""
    sequences = config.training.global_batch_tokens // config.data.sequence_length // data_ranks
    tokens = torch.zeros(sequences, config.data.sequence_length, dtype=torch.int64, device=GPU)
    return Batch(tokens, torch.zeros_like(tokens), torch.zeros(sequences, dtype=torch.int64, device=GPU))
