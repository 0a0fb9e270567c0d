"""From a cluster's settings and a run to the batch script: a pure function, so that what is submitted can be read and tested.

Values reach the shell in two ways only: quoted as one word, or in a line of sbatch options, which no shell reads.
"""

import shlex
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import jinja2
from bitlm_dist.launch.attempts import LAUNCH
from bitlm_dist.launch.cluster import Cluster
from bitlm_dist.launch.rank import NUMA

TEMPLATES = Path(__file__).parent / "templates"
REQUEUE_SECONDS = 60  # to end ranks that hang, decide and requeue, before the time limit
PREFLIGHT_START = 180.0  # seconds beside its own limit: imports from a slow disk


@dataclass(frozen=True)
class Job:
    """A run on a cluster.

    Attributes:
        run: the run folder, absolute.
        data: folders that the ranks read beside it, absolute; containers see them.
        nodes: number of nodes.
        cluster: its settings.
        exclude: nodes not to be used.
    """

    run: Path
    data: tuple[Path, ...]
    nodes: int
    cluster: Cluster
    exclude: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the job; the same for all jobs of the run, which a singleton needs."""
        return f"bitlm-{self.run.name}"

    @property
    def tasks(self) -> int:
        """What srun starts: ranks, or launchers of a node's ranks."""
        return self.nodes * self._tasks_per_node

    @property
    def _tasks_per_node(self) -> int:
        return self.cluster.ranks_per_node if self.cluster.launcher == "srun" else 1


def render(job: Job) -> str:
    """The batch script."""
    cluster = job.cluster
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        comment_start_string="<#",  # {# is bash's length of an array
        comment_end_string="#>",
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    environment.filters["comment"] = lambda value: " ".join(str(value).split())
    env = dict(cluster.env)
    if cluster.numa:
        env[NUMA] = ",".join(map(str, cluster.numa))
    return environment.get_template("job.sh").render(
        options=_options(job),
        run=job.run,
        python=cluster.python,
        env=env,
        modules=cluster.modules,
        nodes=job.nodes,
        tasks=job.tasks,
        tasks_per_node=job._tasks_per_node,
        cpus_per_task=_cpus(job),
        command=_command(job),
        host_python=cluster.host_python,
        grace=max(cluster.signal_lead - REQUEUE_SECONDS, cluster.signal_lead // 2),
        rank_prefix=_apptainer(job) if cluster.container and cluster.container.runtime == "apptainer" else "",
        step_flags=_pyxis(job) if cluster.container and cluster.container.runtime == "pyxis" else "",
        preflight=cluster.preflight.enabled,
        preflight_minutes=ceil((cluster.preflight.seconds + PREFLIGHT_START) / 60),
        requeue=cluster.requeue,
    )


def _cpus(job: Job) -> int:
    each = job.cluster.cpus_per_task or 1
    return each if job.cluster.launcher == "srun" else each * job.cluster.ranks_per_node


def _options(job: Job) -> list[str]:
    """Of sbatch, one a line; where a value holds blanks it is quoted as sbatch reads it."""
    cluster = job.cluster
    folder = job.run / LAUNCH
    values: dict[str, object] = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job._tasks_per_node,
        "cpus-per-task": _cpus(job),
        "gpus-per-node": cluster.gpus_per_node or None,
        "mem": cluster.memory,
        "time": cluster.time,
        "signal": f"B:USR2@{cluster.signal_lead}",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "exclude": ",".join(job.exclude) or None,
        # %% would be needed for a folder with % in its name
        "output": f"{str(folder).replace('%', '%%')}/job-%j.log",
        "open-mode": "append",
    }
    words = [f"--{name}={_option(str(value))}" for name, value in values.items() if value is not None]
    words += ["--requeue"] if cluster.requeue else ["--no-requeue"]
    words += ["--exclusive"] if cluster.exclusive else []
    return [*words, *cluster.options]


def _option(value: str) -> str:
    return value if value.replace("\\", "").isprintable() and not set(value) & set(" \t\"'#\\") else f'"{_escaped(value)}"'


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')


def _command(job: Job) -> str:
    """What srun starts, as words of the script; config and python are its variables."""
    cluster, rank = job.cluster, "-m bitlm_dist.launch.rank"
    if cluster.launcher == "srun":
        return f'"$python" {rank} train "$config"'
    starter = "ft_launcher" if cluster.launcher == "nvrx" else '"$python" -m torch.distributed.run'
    # each node's launcher learns its number from Slurm, so the words are put together there
    return (
        'bash -c \'exec "$@" --node-rank="$SLURM_NODEID" ' + f'{rank} train "$0"\' "$config" '
        f"{starter} --nnodes={job.nodes} --nproc-per-node={cluster.ranks_per_node} --rdzv-backend=static "
        '--master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --max-restarts=0'
    )


def _mounts(job: Job) -> list[str]:
    assert job.cluster.container
    return [*(f"{folder}:{folder}" for folder in (job.run, *job.data)), *job.cluster.container.mounts]


def _pyxis(job: Job) -> str:
    assert job.cluster.container
    image, mounts = job.cluster.container.image, ",".join(_mounts(job))
    return f" {shlex.quote(f'--container-image={image}')} {shlex.quote(f'--container-mounts={mounts}')}"


def _apptainer(job: Job) -> str:
    assert job.cluster.container
    gpu = "--nv " if job.cluster.gpus_per_node else ""
    return f"apptainer exec {gpu}--bind {shlex.quote(','.join(_mounts(job)))} {shlex.quote(job.cluster.container.image)} "
