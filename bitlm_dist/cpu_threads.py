"""CPU settings that must be made before torch is loaded.

OpenMP threads wait for each other after every parallel loop, by default in a busy loop. That is
fastest while each thread has a core to itself. If another program needs one of the cores, the
waiting threads keep it from the thread that still works, and training becomes several times slower.
docs/measured/results.md has the measurements behind the settings.

The order of the sums in an MKL product depends on the alignment of its operands in memory, so the
same step can differ in its last bit. MKL's reproducible mode prevents that at the same speed.
"""

import os
import re
from collections.abc import Mapping, MutableMapping

NUM_THREADS = "OMP_NUM_THREADS"
WAIT_POLICY = "OMP_WAIT_POLICY"
SPIN_COUNT = "GOMP_SPINCOUNT"
MKL_MODE = "MKL_CBWR"  # conditional bitwise reproducibility
DEFAULT_SPIN_COUNT = "1000"  # iterations of the waiting loop, some 10 µs
TORCHRUN = "TORCHELASTIC_RUN_ID"


def set_cpu_environment(environment: MutableMapping[str, str]) -> None:
    """Set the variables of OpenMP and MKL that the user has not set.

    Must be called before the first import of torch, which reads them once.

    - Waiting threads spin briefly, then sleep, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT is set.
    - N ranks on a node of C cores get C // N threads each, unless OMP_NUM_THREADS is set. The
      value 1 that torchrun sets by itself counts as unset.
    - MKL's products are bitwise reproducible on one machine, unless MKL_CBWR is set.

    Args:
        environment: variables of this process, inherited by its children; modified in place.
    """
    if WAIT_POLICY not in environment and SPIN_COUNT not in environment:
        environment[WAIT_POLICY] = "passive"  # for any OpenMP
        environment[SPIN_COUNT] = DEFAULT_SPIN_COUNT  # for GNU's, where it overrides the policy

    environment.setdefault(MKL_MODE, "AUTO")  # the machine's fastest instructions

    num_ranks = num_local_ranks(environment)
    set_by_torchrun = TORCHRUN in environment and environment.get(NUM_THREADS) == "1"
    if num_ranks > 1 and (NUM_THREADS not in environment or set_by_torchrun):
        environment[NUM_THREADS] = str(max(1, _cores_per_rank(environment, num_ranks)))


def num_local_ranks(environment: Mapping[str, str]) -> int:
    """Number of ranks of this job on this node.

    Args:
        environment: variables set by torchrun, `bitlm launch local` or a Slurm step; without any of
            them the result is 1.
    """
    if environment.get("LOCAL_WORLD_SIZE", "").isdigit():
        return max(1, int(environment["LOCAL_WORLD_SIZE"]))

    # "2(x3),1": two tasks on each of the first three nodes, one on the fourth
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    per_node = [int(tasks) for tasks, nodes in groups for _ in range(int(nodes or 1))]
    node = int(environment["SLURM_NODEID"]) if environment.get("SLURM_NODEID", "").isdigit() else 0
    return max(1, per_node[node]) if node < len(per_node) else 1


def _cores_per_rank(environment: Mapping[str, str], num_ranks: int) -> int:
    """Number of cores for each rank of this node.

    Slurm may already have bound the rank to its own cores; other launchers let all ranks use all.
    """
    usable = len(os.sched_getaffinity(0))
    if environment.get("SLURM_CPUS_ON_NODE", "").isdigit() and "SLURM_PROCID" in environment:
        return min(usable, int(environment["SLURM_CPUS_ON_NODE"]) // num_ranks)
    return usable // num_ranks
