"""Rank code of test_periodic_evaluation.py: evaluate during training, which fails on one rank."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bitlm_dist.config_loading import load_config
from bitlm_dist.launch.rank_info import read_rank_info
from bitlm_dist.parallel.layout import build_layout
from bitlm_dist.recording import record
from bitlm_dist.training.engine import StepResult
from bitlm_dist.training.trainer import Trainer


def one_rank_fails(file: str, words: list[str]) -> tuple[int, int, int]:
    """Train, where rank 1 fails to evaluate step 4. Both ranks record values, see below.

    Returns:
        Steps taken, recorded failures, and the last evaluated step.
    """
    ranks = read_rank_info(os.environ)
    config = load_config(Path(file), words).config
    trainer = Trainer.build(
        config, layout=build_layout(config.parallel, ranks.world_size, ranks.rank)
    ).open()

    def evaluate(model: Any) -> dict[str, float]:
        if trainer.step == 4 and dist.get_rank() == 1:
            raise ValueError("only here")
        return {"score": 1.0}

    launch = trainer.engine.train_step

    def record_and_launch(batch: Any, step: int) -> StepResult:
        record("average", torch.tensor(10.0 + ranks.rank))
        is_nan = ranks.rank == step - 4  # rank 0 in step 4, rank 1 in step 5
        record("largest", torch.tensor(torch.nan if is_nan else 12.0 + ranks.rank), "max")
        if ranks.rank == 1 and step != 2:
            record("total", torch.tensor(float(step)), "sum")
        return launch(batch, step)

    trainer.engine.train_step = record_and_launch  # type: ignore[method-assign]
    trainer.fit(evaluate=evaluate)
    trainer.close()
    return trainer.step, trainer.evaluations.num_failures, trainer.evaluations.last_step
