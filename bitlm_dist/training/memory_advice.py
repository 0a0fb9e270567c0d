"""Advice for a step that does not fit into GPU memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.sharded_head import is_head_sharded


def out_of_memory_advice(
    config: Config, layout: ParallelLayout, micro_batch_size: int, error: BaseException
) -> str:
    """Explain an out-of-memory error in one line.

    Args:
        config: A checked config.
        layout: The job's parallel layout.
        micro_batch_size: Sequences per forward pass.
        error: The device's error; its first sentences say what was requested and what is free.

    Returns:
        The device's message, and the keys that lower the memory of a step, the cheapest first.
    """
    keys = []
    if micro_batch_size > 1:
        keys.append(f"--parallel.micro_batch_size {micro_batch_size // 2}")
    more = {"none": "selective", "selective": "full"}.get(config.parallel.activation_checkpointing)
    if more is not None:
        keys.append(f"--parallel.activation_checkpointing {more}")

    if (
        layout.world_size > 1
        and config.model.output == "bits"
        and not (is_head_sharded(config, layout) and config.parallel.head.zero_stage == 3)
    ):
        keys.append("--parallel.head.engine deepspeed --parallel.head.zero_stage 3")
    if layout.num_replicas > 1 and not config.optimizer.sharded:
        keys.append("--optimizer.sharded true")

    # Splitting the model further always helps.
    keys.append(f"--parallel.tensor {2 * layout.tensor} --parallel.sequence true")
    keys.append(f"--parallel.pipeline {2 * layout.pipeline}")

    message = ". ".join(" ".join(str(error).split()).split(". ")[:3])
    return (
        f"{message}: a microbatch of {micro_batch_size} sequences does not fit; "
        f"what helps: {', '.join(keys)}"
    )


@contextmanager
def advising_on_memory(engine: Engine, is_first_step: bool) -> Iterator[None]:
    """Turn an out-of-memory error of a step into advice.

    Args:
        engine: Takes the step.
        is_first_step: If not even the first step of a process fits, a restart cannot help: only
            another config can.

    Raises:
        UserError: The device is out of memory in the first step.
        RuntimeError: The device is out of memory in a later step.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = out_of_memory_advice(engine.config, engine.layout, engine.micro_batch_size, error)
        raise (UserError if is_first_step else RuntimeError)(advice) from error
