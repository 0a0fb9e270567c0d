"""Where this process stands in its job, from the variables that torchrun or Slurm set."""

from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from bitlm_dist.errors import UserError


class Ranks(NamedTuple):
    """Place of a process: ``rank`` of ``world`` processes, ``local`` on its node."""

    rank: int
    world: int
    local: int


def read_ranks(environment: Mapping[str, str]) -> Ranks:
    """torchrun's variables, else those of a Slurm step (a plain shell inside an allocation is one process).

    Raises:
        UserError: a variable is no number.
    """
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if all(name in environment for name in names):
            try:
                return Ranks(*(int(environment[name]) for name in names))
            except ValueError:
                shown = ", ".join(f"{name}={environment[name]}" for name in names)
                raise UserError(f"the launcher set {shown}: these must be numbers") from None
    return Ranks(0, 1, 0)


def export_ranks(ranks: Ranks, environment: MutableMapping[str, str]) -> None:
    """Export the rank in the variables that torch and DeepSpeed read, which a plain `srun` does not set."""
    environment.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world), LOCAL_RANK=str(ranks.local))
