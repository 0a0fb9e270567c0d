"""Rendering of the batch script from a cluster config and a run; a pure function, so the submitted
script can be read and tested.

Values reach the shell in two ways only: quoted as one word, or in an `#SBATCH` line, which no shell
interprets.
"""

import shlex
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import jinja2

from bitlm_dist.launch.attempts import LAUNCH
from bitlm_dist.launch.cluster import Cluster
from bitlm_dist.launch.rank import NUMA_VARIABLE

TEMPLATES = Path(__file__).parent / "templates"

# seconds before the time limit that are kept to end hung ranks, decide, and requeue
REQUEUE_SECONDS = 60

# seconds added to the timeout of preflight: imports from a slow disk
PREFLIGHT_STARTUP_SECONDS = 180.0


@dataclass(frozen=True)
class Job:
    """A run on a cluster.

    Attributes:
        run_folder: the run folder, absolute.
        data_folders: other folders that the ranks use, absolute; mounted into containers.
        num_nodes: number of nodes.
        cluster: the cluster config.
        exclude: nodes that the job must not use.
    """

    run_folder: Path
    data_folders: tuple[Path, ...]
    num_nodes: int
    cluster: Cluster
    exclude: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Job name. A singleton requires the same name for all jobs of the run."""
        return f"bitlm-{self.run_folder.name}"

    @property
    def num_tasks(self) -> int:
        """Number of tasks of srun: ranks, or launchers of the ranks of a node."""
        return self.num_nodes * self._tasks_per_node

    @property
    def _tasks_per_node(self) -> int:
        return self.cluster.ranks_per_node if self.cluster.launcher == "srun" else 1


def render(job: Job) -> str:
    """Render the batch script."""
    cluster = job.cluster
    env = dict(cluster.env)
    if cluster.numa:
        env[NUMA_VARIABLE] = ",".join(map(str, cluster.numa))

    # the ranks may save until then; short lead times are divided in half
    grace = max(cluster.signal_before_timeout - REQUEUE_SECONDS, cluster.signal_before_timeout // 2)
    runtime = cluster.container.runtime if cluster.container else None

    return (
        _template_environment()
        .get_template("job.sh")
        .render(
            options=_sbatch_options(job),
            run=job.run_folder,
            python=cluster.python,
            env=env,
            modules=cluster.modules,
            nodes=job.num_nodes,
            tasks=job.num_tasks,
            tasks_per_node=job._tasks_per_node,
            cpus_per_task=_cpus_per_task(job),
            command=_rank_command(job),
            host_python=cluster.host_python,
            grace=grace,
            rank_prefix=_apptainer_prefix(job) if runtime == "apptainer" else "",
            step_flags=_pyxis_flags(job) if runtime == "pyxis" else "",
            preflight=cluster.preflight.enabled,
            preflight_minutes=ceil((cluster.preflight.seconds + PREFLIGHT_STARTUP_SECONDS) / 60),
            requeue=cluster.requeue,
        )
    )


def _template_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        comment_start_string="<#",  # {# is bash's length of an array
        comment_end_string="#>",
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))

    # a line break would end the comment, and the shell would run the rest
    environment.filters["comment"] = lambda value: " ".join(str(value).split())
    return environment


def _cpus_per_task(job: Job) -> int:
    cpus_per_rank = job.cluster.cpus_per_task or 1
    return (
        cpus_per_rank
        if job.cluster.launcher == "srun"
        else cpus_per_rank * job.cluster.ranks_per_node
    )


def _sbatch_options(job: Job) -> list[str]:
    """Options of sbatch, one per line; values with blanks are quoted as sbatch reads them."""
    cluster = job.cluster
    folder = job.run_folder / LAUNCH

    values: dict[str, object] = {
        "job-name": job.name,
        "nodes": job.num_nodes,
        "ntasks-per-node": job._tasks_per_node,
        "cpus-per-task": _cpus_per_task(job),
        "gpus-per-node": cluster.gpus_per_node or None,
        "mem": cluster.memory,
        "time": cluster.time,
        # B: to the batch script alone, which tells the ranks
        "signal": f"B:USR2@{cluster.signal_before_timeout}",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "exclude": ",".join(job.exclude) or None,
        # sbatch expands % in file names, so a % in the folder's name is doubled
        "output": f"{str(folder).replace('%', '%%')}/job-%j.log",
        "open-mode": "append",
    }
    words = [
        f"--{name}={_quote_option(str(value))}"
        for name, value in values.items()
        if value is not None
    ]

    words += ["--requeue"] if cluster.requeue else ["--no-requeue"]
    words += ["--exclusive"] if cluster.exclusive else []
    return [*words, *cluster.options]


def _quote_option(value: str) -> str:
    return (
        value
        if value.replace("\\", "").isprintable() and not set(value) & set(" \t\"'#\\")
        else f'"{_escape(value)}"'
    )


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


def _rank_command(job: Job) -> str:
    """Command of each task of srun; it uses the script's variables ``python`` and ``config``."""
    cluster = job.cluster
    rank = "-m bitlm_dist.launch.rank"
    if cluster.launcher == "srun":
        return f'"$python" {rank} train "$config"'

    starter = "ft_launcher" if cluster.launcher == "nvrx" else '"$python" -m torch.distributed.run'

    # Slurm sets SLURM_NODEID on each node, so a shell there must complete the command
    return (
        'bash -c \'exec "$@" --node-rank="$SLURM_NODEID" ' + f'{rank} train "$0"\' "$config" '
        f"{starter} --nnodes={job.num_nodes} --nproc-per-node={cluster.ranks_per_node} "
        "--rdzv-backend=static "
        '--master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0'
    )


def _mounts(job: Job) -> list[str]:
    assert job.cluster.container
    return [
        *(f"{folder}:{folder}" for folder in (job.run_folder, *job.data_folders)),
        *job.cluster.container.mounts,
    ]


def _pyxis_flags(job: Job) -> str:
    """Flags of srun that start each task in the container."""
    assert job.cluster.container
    image = shlex.quote(f"--container-image={job.cluster.container.image}")
    mounts = shlex.quote(f"--container-mounts={','.join(_mounts(job))}")
    return f" {image} {mounts}"


def _apptainer_prefix(job: Job) -> str:
    """Prefix of each task's command that runs it in the container."""
    assert job.cluster.container
    gpu = "--nv " if job.cluster.gpus_per_node else ""
    bind = f"--bind {shlex.quote(','.join(_mounts(job)))}"
    return f"apptainer exec {gpu}{bind} {shlex.quote(job.cluster.container.image)} "
