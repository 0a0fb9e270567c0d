"""Rank of this process, from the environment variables of torchrun or Slurm."""

from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from bitlm_dist.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # of mpirun


class RankInfo(NamedTuple):
    """Global rank, number of ranks, and rank within the node."""

    rank: int
    world_size: int
    local_rank: int


def read_rank_info(environment: Mapping[str, str]) -> RankInfo:
    """Read torchrun's variables, else those of a Slurm step.

    Without either, as in a plain shell inside an allocation, the process is the only rank.

    Raises:
        UserError: a variable is not an integer, or the variables say that there are other ranks,
            but not which one this is. It would train alone, beside others that do the same.
    """
    names = _complete_names(environment)
    if names:
        try:
            return RankInfo(*(int(environment[name]) for name in names))
        except ValueError:
            shown = ", ".join(f"{name}={environment[name]}" for name in names)
            raise UserError(f"the launcher set {shown}: these must be numbers") from None

    for size in ("WORLD_SIZE", *MPI_SIZES):
        if environment.get(size, "1") != "1":
            missing = ", ".join(name for name in TORCHRUN if name not in environment)
            raise UserError(
                f"{size}={environment[size]} says that there are several ranks, but {missing} "
                "are not set: start them with torchrun, srun or `bitlm launch`, or set these"
            )
    return RankInfo(0, 1, 0)


def is_launched(environment: Mapping[str, str]) -> bool:
    """True if `bitlm launch`, torchrun or srun started this process, and judges its exit code."""
    return bool(_complete_names(environment))


def _complete_names(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The variables of the launcher that set all of its own; empty if there is none."""
    for names in (TORCHRUN, SLURM):
        if all(name in environment for name in names):
            return names
    return ()


def export_rank_info(rank_info: RankInfo, environment: MutableMapping[str, str]) -> None:
    """Set the variables that torch and DeepSpeed read and a plain `srun` does not set."""
    environment.update(
        RANK=str(rank_info.rank),
        WORLD_SIZE=str(rank_info.world_size),
        LOCAL_RANK=str(rank_info.local_rank),
    )
