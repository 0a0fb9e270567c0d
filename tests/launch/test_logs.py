import json
import os
import threading
import time

import pytest

from bitlm_dist.errors import UserError
from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import Outcome
from bitlm_dist.launch.logs import follow_log, read_log_tail
from bitlm_dist.launch.outcomes import outcome_of
from bitlm_dist.launch.rank_exit import report_exit
from bitlm_dist.launch.rank_log import HANG_LINE

TRACEBACK = ["Traceback (most recent call last):", "  File x", "RuntimeError: closed by peer"]


def write_log(folder, rank, lines):
    (folder / "logs" / f"rank-{rank}.log").write_text("".join(f"{line}\n" for line in lines))


def end(launched, folder):
    launched.end(*outcome_of(folder, 1))


def test_the_log_of_a_killed_rank_and_not_of_the_one_that_lost_it(launched):
    folder = launched.start()
    write_log(folder, 0, TRACEBACK)
    write_log(folder, 1, ["step 7"])
    environment = {attempts.ATTEMPT_VARIABLE: str(folder)}
    attempts.report_failure(environment, 0, "closed by peer", lost_peer=True, refused=False)
    report_exit(folder, 1, -9, time.time())
    title, lines = read_log_tail(launched.folder, None, None)
    assert lines == ["step 7"], "also while the launcher has not yet recorded the end"
    end(launched, folder)
    title, lines = read_log_tail(launched.folder, None, None)
    assert title.startswith("attempt 1, rank 1, which at ")
    assert title.endswith(" was killed by signal 9 (SIGKILL); out of memory? see dmesg")
    assert lines == ["step 7"]
    title, lines = read_log_tail(launched.folder, 0, None)
    assert title.startswith("attempt 1, rank 0; failed: rank 1 on ")
    assert lines == TRACEBACK


def test_a_killed_rank_that_only_srun_saw(launched):
    folder = launched.start()
    for rank in (0, 1):
        write_log(folder, rank, [f"rank {rank}"])
    environment = {attempts.ATTEMPT_VARIABLE: str(folder)}
    attempts.report_failure(environment, 0, "closed by peer", lost_peer=True, refused=False)
    (folder / "start.log").write_text("srun: error: n1: task 1: Killed\n")
    end(launched, folder)
    title, lines = read_log_tail(launched.folder, None, None)
    assert title == "attempt 1, rank 1; failed: rank 1 on n1 was killed by signal 9 (SIGKILL)"
    assert lines == ["rank 1"]


def test_a_hang_is_explained_and_the_stacks_of_the_others_are_shown(launched):
    folder = launched.start()
    what = {"rank": 1, "host": "n1", "what": "gave no sign of life for 10 s", "noticed_by": 0}
    (folder / "hung.json").write_text(json.dumps(what))
    write_log(folder, 1, [])
    for rank in (0, 2, 3, 4):
        write_log(folder, rank, ["step 1", f"{HANG_LINE} (12:00)", f"stack of {rank}"])
    end(launched, folder)
    title, lines = read_log_tail(launched.folder, None, None)
    assert (
        title == "attempt 1, rank 1; the attempt hung: rank 1 on n1 gave no sign of life for 10 s"
    )
    assert lines[0] == "it printed nothing"
    assert [line for line in lines if line.startswith("stack of")] == [
        "stack of 0",
        "stack of 2",
        "stack of 3",
    ]
    assert lines[-1] == f"--- the stacks of 1 more rank are in {folder / 'logs'}"


def test_a_rank_that_failed_is_shown_with_its_whole_traceback(launched):
    folder = launched.start()
    lines = [TRACEBACK[0], *(f"  File {i}" for i in range(40)), "ValueError: x"]
    write_log(folder, 0, ["step 1"] * 30 + lines)
    environment = {attempts.ATTEMPT_VARIABLE: str(folder)}
    attempts.report_failure(environment, 0, "ValueError: x", lost_peer=False, refused=False)
    end(launched, folder)
    title, shown = read_log_tail(launched.folder, None, None)
    assert "the first to fail, at " in title
    assert title.endswith(": ValueError: x")
    assert shown == lines
    launched.start()
    with pytest.raises(UserError, match=r"rank-0\.log is not there: .* job's own log in"):
        read_log_tail(launched.folder, None, None)
    start_log = attempts.attempt_folder(launched.folder, 2) / "start.log"
    start_log.touch()
    with pytest.raises(UserError, match=rf"the rank never started, see {start_log}"):
        read_log_tail(launched.folder, None, None)
    with pytest.raises(UserError, match="has no attempt 3: it has 2 attempts"):
        read_log_tail(launched.folder, None, 3)


def test_a_log_is_followed_into_the_next_attempt(launched, monkeypatch):
    monkeypatch.setattr("bitlm_dist.launch.logs.FOLLOW_POLL", 0.01)
    first = launched.start()
    write_log(first, 0, ["a"])
    is_active = threading.Event()
    is_active.set()
    seen = []

    def follow():
        seen.extend(follow_log(launched.folder, None, None, is_active.is_set))

    reader = threading.Thread(target=follow)
    reader.start()
    while "a" not in seen:
        time.sleep(0.01)
    with (first / "logs" / "rank-0.log").open("a") as log:
        log.write("b\n")
    launched.end(Outcome.FAILED, "why")
    second = launched.start()
    write_log(second, 0, ["c"])
    is_active.clear()
    launched.end(Outcome.DONE, "step 9")
    reader.join(10)
    assert seen == [
        "attempt 1, rank 0",
        "a",
        "b",
        "attempt 1: failed: why",
        "attempt 2, rank 0",
        "c",
        "attempt 2: done: step 9",
    ]
    only = list(follow_log(launched.folder, 0, 1, lambda: True))
    assert only == seen[:4], "with a number, no other attempt is followed"


def test_a_log_whose_launcher_was_killed_is_not_followed_for_ever(launched):
    folder = launched.start()
    write_log(folder, 0, ["a"])
    os.utime(folder / "logs" / "rank-0.log", (0, 0))
    file = folder / "attempt.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "began": 0.0}))
    lines = list(follow_log(launched.folder, None, None, lambda: False))
    assert lines == ["attempt 1, rank 0", "a", "attempt 1: its launcher was ended"]
