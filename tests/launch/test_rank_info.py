import pytest

from bitlm_dist.errors import UserError
from bitlm_dist.launch.rank_info import is_launched, read_rank_info

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


@pytest.mark.parametrize("size", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_rank_among_others_does_not_train_alone(size):
    assert read_rank_info({size: "1"}) == (0, 1, 0)
    with pytest.raises(UserError, match=f"{size}=2 .* RANK, .*LOCAL_RANK are not set: .*torchrun"):
        read_rank_info({size: "2"})
    assert read_rank_info(SLURM | {size: "4"}) == (2, 4, 0), "a batch script may export it"


def test_who_judges_the_exit_code():
    assert is_launched(TORCHRUN)
    assert is_launched(SLURM)
    assert not is_launched({})
    assert not is_launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}), "a shell in an allocation"
