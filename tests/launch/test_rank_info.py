import pytest

from bitlm_dist.errors import UserError
from bitlm_dist.launch.rank_info import read_rank_info

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}


def test_places_by_launcher():
    assert read_rank_info({}) == (0, 1, 0)
    assert read_rank_info(TORCHRUN) == (3, 8, 1)
    assert read_rank_info(SLURM) == (2, 4, 0)
    assert read_rank_info(SLURM | TORCHRUN) == (3, 8, 1)
    assert read_rank_info({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == (0, 1, 0), (
        "a shell in an allocation"
    )


def test_a_broken_variable_is_shown():
    with pytest.raises(UserError, match="RANK=x, WORLD_SIZE=8"):
        read_rank_info(TORCHRUN | {"RANK": "x"})
