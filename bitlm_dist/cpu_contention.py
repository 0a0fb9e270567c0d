"""Detection of cores that other programs keep busy."""

import os
import time

from bitlm_dist.cpu_threads import NUM_THREADS, num_local_ranks
from bitlm_dist.formatting import plural

BACKGROUND_CORES = 0.3  # cores that an idle machine uses now and then


class CpuContention:
    """Measures how many of this process's cores other programs keep busy since construction."""

    def __init__(self) -> None:
        self._start_time = time.monotonic()
        self._busy_at_start = _busy_seconds()
        self._job_at_start = _job_seconds()

    def num_cores_used_by_others(self) -> float:
        """Average number of cores used outside this job, time withheld by a hypervisor included."""
        seconds = max(time.monotonic() - self._start_time, 1e-3)
        others = (_busy_seconds() - self._busy_at_start) - (_job_seconds() - self._job_at_start)
        return max(0.0, others / seconds)

    def warning(self, num_threads: int) -> str | None:
        """Describe a shortage of cores in one line.

        Args:
            num_threads: threads per rank.

        Returns:
            None if the free cores suffice for the threads of all ranks on this node.
        """
        num_cores = len(os.sched_getaffinity(0))
        others = self.num_cores_used_by_others()
        num_ranks = num_local_ranks(os.environ)
        num_wanted = num_ranks * num_threads

        # even an idle machine uses a fraction of a core
        if num_wanted <= num_cores - others + BACKGROUND_CORES:
            return None

        ranks = (
            f"{num_ranks} ranks x {plural(num_threads, 'thread')}"
            if num_ranks > 1
            else plural(num_threads, "thread")
        )
        busy = (
            f", of which other programs keep {others:.1f} busy" if others > BACKGROUND_CORES else ""
        )
        fewer = f"set {NUM_THREADS} lower" if num_threads > 1 else "start fewer ranks"
        remedy = f"end the others or {fewer}" if num_ranks * num_threads > 1 else "end the others"
        return f"{ranks} on {plural(num_cores, 'core')}{busy}: training will be slower; {remedy}"


def _busy_seconds() -> float:
    """CPU-seconds since boot that the cores available to this process were busy."""
    import psutil

    cores = os.sched_getaffinity(0)
    times = psutil.cpu_times(percpu=True)

    # user and nice already include guest time
    return sum(
        sum(t) - t.idle - t.iowait - t.guest - t.guest_nice
        for core, t in enumerate(times)
        if core in cores
    )


def _job_seconds() -> float:
    """CPU-seconds of this process and its children, and of the job's other ranks on this node."""
    import psutil

    # the ranks of a node are children of the same launcher
    root = psutil.Process(os.getppid()) if num_local_ranks(os.environ) > 1 else psutil.Process()
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            used = process.cpu_times()
        except psutil.Error:  # it has ended
            continue
        total += used.user + used.system
    return total
