"""What a cluster wants: one YAML file each, configs/clusters/*.yaml or the user's own."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from bitlm_dist.config import Section
from bitlm_dist.config_loading import COMMAND_LINE, CONFIGS, explain, nested
from bitlm_dist.errors import UserError
from bitlm_dist.yaml_files import EXPANDED, Entry, read_file

CLUSTERS = CONFIGS / "clusters"
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d{1,3}):(?P<minutes>\d{2}):(?P<seconds>\d{2})")
PathText = Annotated[str, EXPANDED]  # ~ and variables are replaced when the file is read: scripts quote it
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def seconds_of(time: str) -> int | None:
    """Seconds of HH:MM:SS or D-HH:MM:SS; None: it is neither."""
    parts = TIME.fullmatch(time)
    if parts is None:
        return None
    days, hours, minutes, seconds = (int(parts[name] or 0) for name in ("days", "hours", "minutes", "seconds"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class Container(Section):
    """An image that the ranks run in."""

    runtime: Literal["pyxis", "apptainer"]
    """pyxis: flags on srun; apptainer: `apptainer exec` before the rank."""
    image: PathText
    """Name or file, as the runtime takes it."""
    mounts: tuple[PathText, ...] = ()
    """Folders of the host that are seen inside, SOURCE or SOURCE:TARGET; run folder and data are always."""


class Preflight(Section):
    """What a node must do before training begins."""

    enabled: bool = True
    """Measure every node first."""
    disk_gb: float = Field(10.0, ge=0)
    """Free space of the run folder's disk, at least."""
    clock_seconds: float = Field(5.0, gt=0)
    """How far a node's clock may be from the median."""
    gemm: float = Field(0.7, ge=0, le=1)
    """Share of the median node's speed at matrix products, at least."""
    bandwidth: float = Field(0.5, ge=0, le=1)
    """Share of the median link's speed, at least, over a node's better link."""
    seconds: float = Field(120.0, gt=0)
    """After which a node that said nothing is broken."""


class Watch(Section):
    """When a rank is taken to hang; seconds."""

    beat: float = Field(10.0, gt=0)
    """Between two signs of life."""
    frozen: float = Field(120.0, gt=0)
    """Without any sign of life."""
    stalled: float = Field(1800.0, gt=0)
    """Without a step, evaluations and saves included."""
    start: float = Field(3600.0, gt=0)
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
    """GPUs that are asked for on each node."""
    tasks_per_node: int | None = Field(None, ge=1)
    """Ranks on each node; none: one a GPU, or one."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPUs of each rank."""
    memory: str | None = Field(None, pattern=r"^\d+[KMGT]?$")
    """Memory of each node, e.g. 500G; 0: all."""
    exclusive: bool = False
    """Share nodes with no other job."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, e.g. --mail-type=END."""
    time: str = "24:00:00"
    """Walltime, HH:MM:SS or D-HH:MM:SS."""
    signal_lead: int = Field(300, ge=1)
    """Seconds before the walltime's end at which the run saves and gives way; Slurm may be a minute early."""
    save_seconds: int = Field(120, ge=1)
    """What a step and a save together may take."""
    requeue: bool = True
    """Queue the same job again; false: submit another one that waits for this (a singleton)."""
    max_restarts: int = Field(3, ge=0)
    """In a row without a new checkpoint; then the run is given up."""
    pause: float = Field(60.0, ge=0)
    """Seconds before ranks that failed without a new checkpoint start again; twice as long each time, at most five minutes. Should
    be together longer than Slurm takes to notice a dead node."""
    launcher: Literal["srun", "torchrun", "nvrx"] = "srun"
    """srun: one task a rank; torchrun, nvrx (ft_launcher of nvidia-resiliency-ext): one task a node that starts the ranks."""
    python: PathText = sys.executable
    """Python of the ranks, as seen on the nodes or in the container."""
    host_python: PathText = sys.executable
    """Python outside of any container, with bitlm_dist, that asks and decides on the first node; it needs no torch."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables of the ranks."""
    numa: tuple[int, ...] = ()
    """NUMA node of each local rank; none: no binding."""
    container: Container | None = None
    """Image; none: the host."""
    preflight: Preflight = Preflight()
    """Checks of the nodes."""
    watch: Watch = Watch()
    """Hanging ranks."""

    @field_validator("time")
    @classmethod
    def _is_time(cls, value: str) -> str:
        if seconds_of(value) is None:
            raise ValueError("expected HH:MM:SS or D-HH:MM:SS")
        return value

    @field_validator("env")
    @classmethod
    def _are_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a variable")
        return value

    @field_validator("partition", "account", "qos", "constraint", "reservation", "options")
    @classmethod
    def _is_one_line(cls, value: Any) -> Any:
        for text in value if isinstance(value, tuple) else (value or "",):
            if not text.isprintable():
                raise ValueError("expected one line")
        return value

    @property
    def ranks_per_node(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def seconds(self) -> int:
        """The walltime."""
        seconds = seconds_of(self.time)
        assert seconds is not None
        return seconds

    def check(self) -> None:
        """Raise a UserError for values that do not go together."""
        if self.watch.frozen < 3 * self.watch.beat:
            raise UserError(f"watch.frozen = {self.watch.frozen} must be at least three times watch.beat = {self.watch.beat}")
        if self.seconds <= 60 + self.signal_lead + self.save_seconds:
            raise UserError(
                f"time = {self.time} leaves nothing to train in: it must be above signal_lead + save_seconds + a minute "
                f"({self.signal_lead} + {self.save_seconds} + 60 s)"
            )
        if self.numa and len(self.numa) != self.ranks_per_node:
            raise UserError(
                f"numa names {len(self.numa)} NUMA nodes, for {self.ranks_per_node} ranks on each node: name one a rank"
            )


def load_cluster(name: str | None, changes: Mapping[str, Any]) -> Cluster:
    """A cluster's file with changes from the command line.

    Args:
        name: a YAML file, or the name of one that ships; None: every default.
        changes: values by key; None values change nothing.

    Raises:
        UserError: names file, key and value.
    """
    entries: dict[str, Entry] = {}
    if name is not None:
        file = next((f for f in (Path(name), CLUSTERS / f"{name}.yaml") if f.is_file()), None)
        if file is None:
            known = ", ".join(sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
            raise UserError(f"--cluster {name}: no such file; shipped with the package: {known}")
        entries = read_file(file, Cluster)
    entries.update({key: Entry(value, COMMAND_LINE) for key, value in changes.items() if value is not None})
    try:
        cluster = Cluster.model_validate(nested({key: entry.value for key, entry in entries.items()}))
    except ValidationError as error:
        where = f"cluster {name}: " if name else ""
        raise UserError(where + explain(error, {key: entry.source for key, entry in entries.items()})) from None
    cluster.check()
    return cluster
