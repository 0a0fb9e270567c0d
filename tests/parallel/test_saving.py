"""Several ranks save and find checkpoints together: what one of them meets, all know."""

import pytest
from ranks import run_ranks

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint.steps import folder_of

RANKS = 3
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    folder = tmp_path_factory.mktemp("ranks")
    root.mkdir()
    return root, run_ranks(RANKS, "saving", "together", str(root), folder=folder)


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_only_that_save(found):
    for report in found[1]:
        step, message = report["failed"]
        assert step == 2
        assert "step-00000002 could not be written" in message
        assert message.endswith("rank 1: disk on fire")
        assert report["steps"] == [1, 3]


def test_each_rank_reads_back_what_it_holds(found):
    for rank, report in enumerate(found[1]):
        read = report["read"]
        assert read["everywhere"].flatten().tolist() == list(range(12))
        assert read["shared"].flatten().tolist() == [rank] * 5
        assert ("last" in read) == (rank == RANKS - 1)


def test_what_no_rank_holds_is_refused_by_all_and_what_one_holds_by_none(found):
    """Above, each rank has loaded what it holds: one of them more than the others."""
    for report in found[1]:
        assert "step-00000001: holds everywhere, last, which the model" in report["unwanted"]


def test_ranks_write_about_as_much_each(found):
    sizes = [
        (folder_of(found[0], 1) / store.rank_file_name(rank)).stat().st_size
        for rank in range(RANKS)
    ]
    assert max(sizes) < 2 * min(sizes)


def test_damage_that_one_rank_finds_is_what_all_report_or_fall_back_from(found):
    for report in found[1]:
        assert "step-00000003/rank-00002.safetensors is damaged" in report["refused"]
        folder, state = report["fallback"]
        assert (folder.name, state["tokens"]) == ("step-00000001", 1)
    assert (found[0] / "damaged-step-00000003").is_dir()
