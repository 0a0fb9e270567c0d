import json

import pytest

from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import Limits
from bitlm_dist.launch.rank_exit import describe_exit, exits_seen_by_srun, report_exit


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "was killed by signal 9 (SIGKILL); out of memory? see dmesg"),
        (137, "was killed by signal 9 (SIGKILL); out of memory? see dmesg"),
        (-7, "was killed by signal 7 (SIGBUS); shared memory full? see df /dev/shm"),
        (-11, "was killed by signal 11 (SIGSEGV)"),
        (5, "ended with exit code 5 and reported nothing"),
        (255, "ended with exit code 255 and reported nothing"),
    ],
)
def test_an_exit_in_words(code, words):
    assert describe_exit(code) == words


def test_what_a_rank_has_reported_itself_is_kept(tmp_path):
    folder = attempts.create_attempt(tmp_path, "", 0, ["here"], Limits())
    environment = {attempts.ATTEMPT_VARIABLE: str(folder)}
    attempts.report_failure(environment, 1, "ValueError: x", lost_peer=False, refused=False)
    report_exit(folder, 1, 1, 0.0)
    report_exit(folder, 2, -9, 5.0)
    first, second = (
        json.loads((folder / "failures" / f"rank-{rank}.json").read_text()) for rank in (1, 2)
    )
    assert first["message"] == "ValueError: x"
    assert (second["exit_code"], second["time"]) == (-9, 5.0)


SRUN = """\
srun: error: n1: task 1: Killed
srun: error: n2: tasks 2-3: Segmentation fault (core dumped)
srun: error: n4: task 4: Out Of Memory
srun: error: n5: task 5: Exited with exit code 137
srun: error: n6: task 6: Exited with exit code 5
srun: error: n7: task 7: Exited with exit code 255
"""
ENDED_BY_SRUN = [  # what srun 22.05 prints when it ends the other tasks, alone or one after another
    "srun: launch/slurm: _step_signal: Terminating StepId=17.0",
    "slurmstepd-n0: error: *** STEP 17.0 ON n0 CANCELLED AT 2026-01-31T12:00:00 ***",
    "slurmstepd: error: *** JOB 17 ON n0 CANCELLED AT 2026-01-31T12:00:00 DUE TO TIME LIMIT ***",
]


@pytest.mark.parametrize("ended", ENDED_BY_SRUN)
def test_srun_tells_how_tasks_ended_until_it_ends_them_itself(ended, tmp_path):
    (tmp_path / "start.log").write_text(f"{SRUN}{ended}\nsrun: error: n0: task 0: Terminated\n")
    assert [
        (seen.task, seen.node, seen.words, seen.is_signal) for seen in exits_seen_by_srun(tmp_path)
    ] == [
        (1, "n1", "was killed by signal 9 (SIGKILL); out of memory? see dmesg", True),
        (2, "n2", "was killed by signal 11 (SIGSEGV)", True),
        (4, "n4", "was killed by Slurm: out of memory", True),
        (5, "n5", "was killed by signal 9 (SIGKILL); out of memory? see dmesg", True),
        (6, "n6", "ended with exit code 5 and reported nothing", False),
        (7, "n7", "ended with exit code 255 and reported nothing", False),
    ]
