"""Who else keeps the cores busy."""

import os
import time

from bitlm_dist import cpu_contention
from bitlm_dist.cpu_contention import CpuContention


def test_another_busy_program_is_counted_and_this_process_is_not(monkeypatch):
    busy = [100.0]
    job = [20.0]
    monkeypatch.setattr(cpu_contention, "_busy_seconds", lambda: busy[0])
    monkeypatch.setattr(cpu_contention, "_job_seconds", lambda: job[0])
    times = iter((0.0, *[4.0] * 9))
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cores = CpuContention()

    # in 4 s all cores worked for 6 s, this job for 2 s of them
    busy[0] = 106.0
    job[0] = 22.0
    assert cores.num_cores_used_by_others() == 1.0
    assert cores.warning(1) is None
    assert cores.warning(2).startswith(
        "2 threads on 2 cores, of which other programs keep 1.0 busy: "
    )

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores.warning(1).startswith("2 ranks x 1 thread on 2 cores")


def test_this_process_s_own_work_is_not_taken_for_others():
    cores = CpuContention()
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass

    used_by_all = cpu_contention._busy_seconds() - cores._busy_at_start
    own = cpu_contention._job_seconds() - cores._job_at_start
    assert 0.4 <= own <= used_by_all + 0.1
