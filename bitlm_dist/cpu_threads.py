"""How a process computes on a CPU, chosen before torch is loaded: its OpenMP threads, and sums that repeat; and who else keeps the
cores busy.

OpenMP threads wait for each other after every parallel loop, by default in a busy loop. That is fastest while each thread has a
core to itself. Where another program wants one of the cores, the waiting thread keeps it from the one that still works, and
training becomes several times slower. docs/results.md has the measurements behind what is chosen here.

The order of the sums in an MKL product depends on how its operands are aligned in memory, so that the same step can differ in its
last bit. In MKL's reproducible mode it does not, at the same speed.
"""

import os
import re
import time
from collections.abc import Mapping, MutableMapping

NUM_THREADS, WAIT_POLICY, SPIN_COUNT = "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
MKL_MODE = "MKL_CBWR"  # conditional bitwise reproducibility
SPINS = "1000"  # turns of the waiting loop, some 10 µs
TORCHRUN = "TORCHELASTIC_RUN_ID"
NOISE = 0.3  # cores: what a machine without work uses now and then


def set_cpu_environment(environment: MutableMapping[str, str]) -> None:
    """Set the variables of OpenMP and MKL that the user left open. Must precede the first import of torch, which reads them once.

    - Waiting threads spin for a moment, then sleep, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT is set.
    - N ranks on a node of C cores get C // N threads each, unless OMP_NUM_THREADS is set. The 1 that torchrun sets by itself
      counts as unset.
    - MKL's products are the same bits each time on one machine, unless MKL_CBWR is set.

    Args:
        environment: of this process, from which its children inherit; changed in place.
    """
    if WAIT_POLICY not in environment and SPIN_COUNT not in environment:
        environment[WAIT_POLICY] = "passive"  # for any OpenMP
        environment[SPIN_COUNT] = SPINS  # for GNU's, where it overrides the policy

    environment.setdefault(MKL_MODE, "AUTO")  # the machine's fastest instructions

    num_ranks = num_local_ranks(environment)
    set_by_torchrun = TORCHRUN in environment and environment.get(NUM_THREADS) == "1"
    if num_ranks > 1 and (NUM_THREADS not in environment or set_by_torchrun):
        environment[NUM_THREADS] = str(max(1, _cores_per_rank(environment, num_ranks)))


def num_local_ranks(environment: Mapping[str, str]) -> int:
    """Ranks of this job on this node, from the variables of torchrun, `bitlm launch local` or a Slurm step; 1 without any."""
    if environment.get("LOCAL_WORLD_SIZE", "").isdigit():
        return max(1, int(environment["LOCAL_WORLD_SIZE"]))

    # "2(x3),1": two tasks on each of the first three nodes, one on the fourth
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    per_node = [int(tasks) for tasks, nodes in groups for _ in range(int(nodes or 1))]
    node = int(environment["SLURM_NODEID"]) if environment.get("SLURM_NODEID", "").isdigit() else 0
    return max(1, per_node[node]) if node < len(per_node) else 1


def _cores_per_rank(environment: Mapping[str, str], num_ranks: int) -> int:
    """Slurm may have bound a rank to its own share of the node already; other launchers leave all ranks all cores."""
    usable = len(os.sched_getaffinity(0))
    if environment.get("SLURM_CPUS_ON_NODE", "").isdigit() and "SLURM_PROCID" in environment:
        return min(usable, int(environment["SLURM_CPUS_ON_NODE"]) // num_ranks)
    return usable // num_ranks


class BusyCores:
    """Measures from its construction on how many of this process's cores other programs keep busy."""

    def __init__(self) -> None:
        self._began, self._machine, self._job = time.monotonic(), _busy_seconds(), _job_seconds()

    def by_others(self) -> float:
        """Cores that programs outside of this job used on average; what a hypervisor withheld counts too."""
        seconds = max(time.monotonic() - self._began, 1e-3)
        others = (_busy_seconds() - self._machine) - (_job_seconds() - self._job)
        return max(0.0, others / seconds)

    def warning(self, num_threads: int) -> str | None:
        """One line if this node's ranks have more threads than there are cores free for them.

        Args:
            num_threads: of each rank.
        """
        cores, others = len(os.sched_getaffinity(0)), self.by_others()
        num_ranks = num_local_ranks(os.environ)
        wanted = num_ranks * num_threads
        if wanted <= cores - others + NOISE:
            return None

        ranks = f"{num_ranks} ranks x {num_threads} threads" if num_ranks > 1 else f"{num_threads} threads"
        busy = f", of which other programs keep {others:.1f} busy" if others > NOISE else ""
        return f"{ranks} on {cores} cores{busy}: training will be slower; end the others or set {NUM_THREADS} lower"


def _busy_seconds() -> float:
    """CPU-seconds that the cores this process may use were not idle, since the machine started."""
    import psutil

    cores = os.sched_getaffinity(0)
    times = psutil.cpu_times(percpu=True)
    return sum(sum(t) - t.idle - t.iowait - t.guest - t.guest_nice for core, t in enumerate(times) if core in cores)


def _job_seconds() -> float:
    """CPU-seconds of this process, its children and, where its launcher started several ranks here, those."""
    import psutil

    first = psutil.Process(os.getppid()) if num_local_ranks(os.environ) > 1 else psutil.Process()
    total = 0.0
    for process in [first, *first.children(recursive=True)]:
        try:
            used = process.cpu_times()
        except psutil.Error:
            continue
        total += used.user + used.system
    return total
