"""Cluster configs: one YAML file per cluster, from configs/clusters/*.yaml or the user's own."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from bitlm_dist.config_loading import COMMAND_LINE, CONFIGS, format_validation_error, unflatten
from bitlm_dist.config_section import Section
from bitlm_dist.errors import UserError
from bitlm_dist.renamed_keys import renamed_message
from bitlm_dist.yaml_files import EXPANDED, SourcedValue, read_yaml_file

CLUSTERS = CONFIGS / "clusters"
WALLTIME_PATTERN = re.compile(
    r"(?:(?P<days>\d+)-)?(?P<hours>\d{1,3}):(?P<minutes>\d{2}):(?P<seconds>\d{2})"
)

# ~ and variables are expanded when the file is read, because the batch script quotes the values
PathText = Annotated[str, EXPANDED]
VARIABLE_NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RENAMED_KEYS = {  # old: new, since 0.2.0
    "signal_lead": "signal_before_timeout",
    "pause": "restart_backoff",
    "watch.beat": "watch.heartbeat_interval",
    "watch.frozen": "watch.heartbeat_timeout",
    "watch.stalled": "watch.step_timeout",
    "watch.start": "watch.startup_timeout",
}


def parse_walltime(time: str) -> int | None:
    """Parse HH:MM:SS or D-HH:MM:SS.

    Returns:
        Seconds; None if ``time`` has neither form.
    """
    matched = WALLTIME_PATTERN.fullmatch(time)
    if matched is None:
        return None

    days, hours, minutes, seconds = (
        int(matched[name] or 0) for name in ("days", "hours", "minutes", "seconds")
    )
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class Container(Section):
    """Container image that the ranks run in."""

    runtime: Literal["pyxis", "apptainer"]
    """pyxis: flags of srun; apptainer: `apptainer exec` before the rank's command."""
    image: PathText
    """Name or file, as the runtime takes it."""
    mounts: tuple[PathText, ...] = ()
    """Host folders to mount, SOURCE or SOURCE:TARGET; run folder and data are always mounted."""


class Preflight(Section):
    """Requirements that a node must meet before training begins."""

    enabled: bool = True
    """Measure every node first."""
    disk_gb: float = Field(10.0, ge=0)
    """Minimum free space on the run folder's disk."""
    clock_seconds: float = Field(5.0, gt=0)
    """Maximum distance of a node's clock from the median."""
    gemm: float = Field(0.7, ge=0, le=1)
    """Minimum speed at matrix products, as a fraction of the median node's."""
    bandwidth: float = Field(0.5, ge=0, le=1)
    """Minimum speed of a node's better link, as a fraction of the median."""
    seconds: float = Field(120.0, gt=0)
    """Timeout after which a node without a result counts as broken."""


class Watch(Section):
    """Heartbeat interval, and timeouts after which a rank counts as hung; all in seconds."""

    heartbeat_interval: float = Field(10.0, gt=0)
    """Between two heartbeats."""
    heartbeat_timeout: float = Field(120.0, gt=0)
    """Without a heartbeat."""
    step_timeout: float = Field(1800.0, gt=0)
    """Without a step, evaluations and saves included."""
    startup_timeout: float = Field(3600.0, gt=0)
    """Until the first step."""


class Cluster(Section):
    """How jobs are submitted and ranks are started."""

    partition: str | None = None
    """Partition; none: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features."""
    reservation: str | None = None
    """Reservation."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs to request per node."""
    tasks_per_node: int | None = Field(None, ge=1)
    """Ranks per node; none: one per GPU, or one on nodes without GPUs."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPUs per rank."""
    memory: str | None = Field(None, pattern=r"^\d+[KMGT]?$")
    """Memory per node, e.g. 500G; 0: all."""
    exclusive: bool = False
    """Share nodes with no other job."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, e.g. --mail-type=END."""
    time: str = "24:00:00"
    """Walltime, HH:MM:SS or D-HH:MM:SS."""
    signal_before_timeout: int = Field(300, ge=1)
    """Seconds before the end of the walltime at which the run checkpoints and exits; Slurm may send
    the signal a minute early."""
    save_seconds: int = Field(120, ge=1)
    """Time to allow for one step and one save together."""
    requeue: bool = True
    """Requeue the same job; false: submit a successor (a singleton) that waits for it instead."""
    max_restarts: int = Field(3, ge=0)
    """Consecutive restarts without a new checkpoint after which the run is given up."""
    restart_backoff: float = Field(60.0, ge=0)
    """Seconds before ranks that failed without a new checkpoint start again; doubles each time, up
    to five minutes. All waits together should be longer than Slurm takes to notice a dead node."""
    launcher: Literal["srun", "torchrun", "nvrx"] = "srun"
    """srun: one task per rank; torchrun, nvrx (ft_launcher of nvidia-resiliency-ext): one task per
    node, which starts the ranks."""
    python: PathText = sys.executable
    """Python of the ranks, as seen on the nodes or in the container."""
    host_python: PathText = sys.executable
    """Python outside of any container that runs the supervisor on the first node; it must have
    bitlm_dist, but needs no torch."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the ranks."""
    numa: tuple[int, ...] = ()
    """NUMA node of each local rank; none: no binding."""
    container: Container | None = None
    """Container image; none: the ranks run on the host."""
    preflight: Preflight = Preflight()
    """Checks of the nodes before training."""
    watch: Watch = Watch()
    """Detection of hung ranks."""

    @field_validator("time")
    @classmethod
    def _check_time(cls, value: str) -> str:
        if parse_walltime(value) is None:
            raise ValueError("expected HH:MM:SS or D-HH:MM:SS")
        return value

    @field_validator("env")
    @classmethod
    def _check_variable_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not VARIABLE_NAME_PATTERN.fullmatch(name):
                raise ValueError(f"{name!r} is not a variable name")
        return value

    @field_validator("partition", "account", "qos", "constraint", "reservation", "options")
    @classmethod
    def _check_one_line(cls, value: Any) -> Any:
        """Refuse line breaks: each value becomes one line of the batch script's header."""
        for text in value if isinstance(value, tuple) else (value or "",):
            if not text.isprintable():
                raise ValueError("expected one line")
        return value

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def walltime_seconds(self) -> int:
        """Walltime in seconds."""
        seconds = parse_walltime(self.time)
        assert seconds is not None
        return seconds

    def check(self) -> None:
        """Check values that depend on each other.

        Raises:
            UserError: two values contradict each other.
        """
        # a single late heartbeat must not be reported as a hang
        if self.watch.heartbeat_timeout < 3 * self.watch.heartbeat_interval:
            raise UserError(
                f"watch.heartbeat_timeout = {self.watch.heartbeat_timeout} must be at least three "
                f"times watch.heartbeat_interval = {self.watch.heartbeat_interval}"
            )

        # Slurm may signal up to a minute early
        if self.walltime_seconds <= 60 + self.signal_before_timeout + self.save_seconds:
            raise UserError(
                f"time = {self.time} leaves no time to train: it must be above "
                f"signal_before_timeout + save_seconds + a minute "
                f"({self.signal_before_timeout} + {self.save_seconds} + 60 s)"
            )

        if self.numa and len(self.numa) != self.ranks_per_node:
            raise UserError(
                f"numa names {len(self.numa)} NUMA nodes, for {self.ranks_per_node} ranks on each "
                "node: name one per rank"
            )


def load_cluster(name: str | None, overrides: Mapping[str, Any]) -> Cluster:
    """Load a cluster config and apply overrides from the command line.

    Args:
        name: a YAML file, or the name of one that ships with the package; None: all defaults.
        overrides: values by key; None values change nothing.

    Raises:
        UserError: the file is missing or a value is invalid; names file, key and value.
    """
    entries: dict[str, SourcedValue] = {}
    if name is not None:
        entries = _read_cluster_file(name)

    entries.update(
        {
            key: SourcedValue(value, COMMAND_LINE)
            for key, value in overrides.items()
            if value is not None
        }
    )

    try:
        cluster = Cluster.model_validate(
            unflatten({key: entry.value for key, entry in entries.items()})
        )
    except ValidationError as error:
        where = f"cluster {name}: " if name else ""
        raise UserError(
            where
            + format_validation_error(error, {key: entry.source for key, entry in entries.items()})
        ) from None

    # the fields are valid one by one; now together
    cluster.check()
    return cluster


def _read_cluster_file(name: str) -> dict[str, SourcedValue]:
    """Read the entries of a cluster config, and refuse keys that were renamed."""
    file = next((f for f in (Path(name), CLUSTERS / f"{name}.yaml") if f.is_file()), None)
    if file is None:
        shipped = ", ".join(sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
        raise UserError(f"--cluster {name}: no such file; shipped with the package: {shipped}")

    entries = read_yaml_file(file, Cluster)
    for key, entry in entries.items():
        if key in RENAMED_KEYS:
            raise UserError(renamed_message(key, entry.source, RENAMED_KEYS[key]))

    return entries
