"""Rank code of test_stopping.py: a stop that only one rank is asked for."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from bitlm_dist.config_loading import load_config
from bitlm_dist.launch.rank_info import read_rank_info
from bitlm_dist.parallel.layout import build_layout
from bitlm_dist.training.trainer import Trainer


def one_rank_is_asked(file: str, words: list[str], where: str) -> tuple[int, str | None, int]:
    """Train, where rank 1 gets SIGTERM: in step 2, or in the evaluation of step 4.

    Returns:
        Steps taken, why the run ended, and the last evaluated step.
    """
    ranks = read_rank_info(os.environ)
    config = load_config(Path(file), words).config

    def ask(metrics: Any) -> None:
        if ranks.rank == 1 and where == "step" and metrics["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def evaluate(model: Any) -> dict[str, float]:
        if ranks.rank == 1 and where == "evaluation":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return {"score": 1.0}

    layout = build_layout(config.parallel, ranks.world_size, ranks.rank)
    with Trainer.build(config, layout).open() as trainer:
        trainer.add_hook(ask)
        trainer.fit(evaluate=evaluate)
        return trainer.step, trainer.stopped_by, trainer.evaluations.last_step
