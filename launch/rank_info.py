"""Rank of this process, from the environment variables of torchrun or Slurm."""

from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from bitlm_dist.errors import UserError


class RankInfo(NamedTuple):
    """Global rank, number of ranks, and rank within the node."""

    rank: int
    world_size: int
    local_rank: int


def read_rank_info(environment: Mapping[str, str]) -> RankInfo:
    """Read torchrun's variables, else those of a Slurm step.

    Without either, as in a plain shell inside an allocation, the process is the only rank.

    Raises:
        UserError: a variable is not an integer.
    """
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ):
        if all(name in environment for name in names):
            try:
                return RankInfo(*(int(environment[name]) for name in names))
            except ValueError:
                shown = ", ".join(f"{name}={environment[name]}" for name in names)
                raise UserError(f"the launcher set {shown}: these must be numbers") from None

    return RankInfo(0, 1, 0)


def export_rank_info(rank_info: RankInfo, environment: MutableMapping[str, str]) -> None:
    """Set the variables that torch and DeepSpeed read and a plain `srun` does not set."""
    environment.update(
        RANK=str(rank_info.rank),
        WORLD_SIZE=str(rank_info.world_size),
        LOCAL_RANK=str(rank_info.local_rank),
    )
