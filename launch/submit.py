"""From a config to a queued job, and what a user does with it afterwards."""

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitlm_dist.launch import agent, attempts, slurm
from bitlm_dist.launch.agent import SETTINGS
from bitlm_dist.launch.attempts import CANCELLED, LAUNCH, Limits
from bitlm_dist.launch.cluster import Cluster
from bitlm_dist.launch.render import Job, render
from bitlm_dist.launch.snapshot import save_code

from bitlm_dist.config import Config
from bitlm_dist.config_loading import load, to_yaml
from bitlm_dist.errors import UserError
from bitlm_dist.files import to_json, try_lock, write_atomically

NODE = re.compile(r"[\w.\[\]-]+")
JOBS, SCRIPT = "jobs", "job.sh"  # numbers of the run's jobs, one a line; what is submitted
MOUNT_SIGNS = set(",: ")  # what container runtimes read as signs in a list of mounts


@dataclass(frozen=True)
class Submitted:
    """A queued job."""

    run: Path
    job: str


def job_of(config: Config, cluster: Cluster, nodes: int, exclude: tuple[str, ...]) -> Job:
    """What to render, for a config with absolute paths.

    Raises:
        UserError: data are not set or there, ranks do not fit the layout, or a path does not go into a container.
    """
    from bitlm_dist.data.manifest import read_manifest
    from bitlm_dist.parallel.layout import check_batch, layout_of

    if config.data.path is None:
        raise UserError("data.path is not set: name the folder that `bitlm prep` wrote")
    for node in exclude:
        if not NODE.fullmatch(node):
            raise UserError(f"--exclude {node!r} is no name of a node")
    layout = layout_of(config.parallel, nodes * cluster.ranks_per_node, 0)
    check_batch(config, layout)
    folders = [config.data.path, *(source.path for source in config.data.sources), config.distillation.teacher, config.data.cache]
    folders.append(checkpoints_of(config))
    data = tuple(dict.fromkeys(folder for folder in folders if folder is not None))
    for folder in data[:1]:
        read_manifest(folder)
    if not str(config.run.dir).isprintable():
        raise UserError(f"run.dir = {config.run.dir!r}: choose a name without line breaks and the like")
    if cluster.container:
        for folder in (config.run.dir, *data):
            if set(str(folder)) & MOUNT_SIGNS:
                raise UserError(f"{folder}: a container takes no folder with a comma, colon or blank in its name")
    return Job(config.run.dir, data, nodes, cluster, exclude)


def checkpoints_of(config: Config) -> Path | None:
    """The folder outside the run folder that holds the run's checkpoints; None: they are inside."""
    link = config.run.dir / "checkpoints"
    return config.checkpoint.dir or (link.resolve() if link.is_symlink() else None)


def check(job: Job) -> None:
    """Raise a UserError if the run folder holds something else, or another job of the run is queued or running."""
    attempts.check_free(job.run, job.data)
    _refuse_second(job.run)


def save(job: Job, config: Config) -> None:
    """Write what the job needs into the run folder."""
    folder, checkpoints = job.run / LAUNCH, checkpoints_of(config)
    if checkpoints is not None:
        attempts.check_link(config.run.dir)
        _make(checkpoints)
    settings = {**settings_of(job), "checkpoints": None if checkpoints is None else str(checkpoints)}
    write_atomically(folder / SETTINGS, to_json(settings, indent=1) + "\n")
    write_atomically(folder / "config.yaml", to_yaml(config))
    save_code(folder)


def _make(checkpoints: Path) -> None:
    """Make the folder of checkpoints on another disk, as containers mount it."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"checkpoint.dir = {checkpoints} cannot be written ({error}): choose another folder") from error


def settings_of(job: Job) -> dict[str, Any]:
    """What decides inside the job."""
    cluster = job.cluster
    return {
        "submission": _now(),
        "exclude": job.exclude,
        "max_restarts": cluster.max_restarts,
        "pause": cluster.pause,
        "gpus_per_node": cluster.gpus_per_node,
        "preflight": cluster.preflight.model_dump(),
        "limits": asdict(Limits(**cluster.watch.model_dump())),
    }


def submit(job: Job, config: Config) -> Submitted:
    """Save what the job needs and queue it; what Slurm refuses leaves everything as it was.

    Raises:
        UserError: the script is refused, or another job of the run is queued or running; nothing was queued.
    """
    slurm.check_time(job.cluster.partition, job.cluster.seconds)
    check(job)
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as tried:
        tried.write(render(job))
        tried.flush()
        slurm.test(Path(tried.name))
    with _submitting(job.run):
        save(job, config)
        write_atomically(job.run / LAUNCH / SCRIPT, render(job))
        return Submitted(job.run, _queue(job.run))


def resume(run: Path) -> Submitted:
    """Queue the saved script again.

    Raises:
        UserError: the run was not launched or has been moved, or a job of it is queued or running.
    """
    script = launched(run) / SCRIPT
    if not script.is_file():
        raise UserError(f"{run} was launched on a machine without Slurm: run the same `bitlm launch local` again")
    before = load(run / LAUNCH / "config.yaml").config.run.dir  # which the script names too
    if not before.exists() or not before.samefile(run):
        raise UserError(f"{run} was launched as {before} and has been moved: use `bitlm launch slurm {run}/config.yaml`")
    with _submitting(run):
        write_atomically(run / LAUNCH / SETTINGS, to_json({**agent.settings_of(run), "submission": _now()}, indent=1) + "\n")
        return Submitted(run, _queue(run))


def cancel(run: Path) -> list[str]:
    """Have the run save and end, and take what is queued out of the queue -> the jobs."""
    launched(run)
    write_atomically(run / LAUNCH / CANCELLED, "")  # also seen by a job that is just being queued again
    active = [job for job in jobs(run) if is_active(job)]
    for job in active:
        running = slurm.show(job).get("JobState") == "RUNNING"
        slurm.cancel(job, *(["--batch", "--signal=USR2"] if running else []))
    every = attempts.read_attempts(run)
    if not active and every and not every[-1].outcome:  # without Slurm
        attempts.ask_to_stop(attempts.folder_of(run, every[-1].number), "cancelled")
    return active


def launched(run: Path) -> Path:
    """The folder of the launcher's files.

    Raises:
        UserError: there is none.
    """
    folder = run / LAUNCH
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{run} was not launched: start it with `bitlm launch slurm` or `bitlm launch local`")
    return folder


def jobs(run: Path) -> list[str]:
    """Numbers of all jobs of the run, the first first."""
    file = run / LAUNCH / JOBS
    queued = file.read_text().split() if file.is_file() else []
    begun = [attempt.job for attempt in attempts.read_attempts(run) if attempt.job]
    return list(dict.fromkeys(job.partition(";")[0] for job in (*queued, *begun)))


def is_active(job: str) -> bool:
    """Whether a job is queued or running."""
    state = slurm.show(job).get("JobState", "")
    return bool(state) and state not in slurm.ENDED


def _refuse_second(run: Path) -> None:
    for job in jobs(run):
        if is_active(job):
            raise UserError(f"job {job} of {run} is queued or running: `bitlm launch status {run}` shows it, `cancel` ends it")


def _queue(run: Path) -> str:
    bad = agent.left_out(run)
    job = slurm.submit(run / LAUNCH / SCRIPT, *([f"--exclude={','.join(bad)}"] if bad else []))
    with (run / LAUNCH / JOBS).open("a") as stream:
        stream.write(f"{job}\n")
    return job


@contextmanager
def _submitting(run: Path) -> Iterator[None]:
    """While open, nobody else submits the run."""
    (run / LAUNCH).mkdir(parents=True, exist_ok=True)
    with (run / LAUNCH / "lock").open("w") as lock:
        if not try_lock(lock):
            raise UserError(f"{run} is being submitted or trained by another `bitlm launch`: wait for it")
        _refuse_second(run)
        (run / LAUNCH / CANCELLED).unlink(missing_ok=True)
        yield


def _now() -> str:
    return f"{time.time():.3f}"
