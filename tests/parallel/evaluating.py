"""What the ranks of test_periodic_evaluation.py do: evaluate while they train, which fails on one of them."""

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from bitlm_dist.launch.ranks import read_ranks

from bitlm_dist.config_loading import load
from bitlm_dist.parallel.layout import layout_of
from bitlm_dist.training.trainer import Trainer


def one_rank_fails(file: str, words: list[str]) -> tuple[int, int, int]:
    """Train; rank 1 cannot evaluate step 4 -> steps taken, failures on record, the last step evaluated."""
    ranks = read_ranks(os.environ)
    config = load(Path(file), words).config
    trainer = Trainer(config, layout=layout_of(config.parallel, ranks.world, ranks.rank))

    def evaluate(model: Any) -> dict[str, float]:
        if trainer.step == 4 and dist.get_rank() == 1:
            raise ValueError("only here")
        return {"score": 1.0}

    trainer.fit(evaluate=evaluate)
    trainer.close()
    return trainer.step, trainer.evaluations.failures, trainer.evaluations.last
