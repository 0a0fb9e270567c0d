"""Submission of runs to Slurm, and the commands on a submitted run: resume, cancel, list jobs."""

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitlm_dist.config import Config
from bitlm_dist.config_loading import load_config, to_yaml
from bitlm_dist.errors import UserError
from bitlm_dist.files import try_lock, write_atomically
from bitlm_dist.launch import attempts, slurm, supervisor
from bitlm_dist.launch.attempts import CANCELLED_FILE, LAUNCH, Limits
from bitlm_dist.launch.cluster import Cluster
from bitlm_dist.launch.liveness import LAUNCHER_LOCK, is_running
from bitlm_dist.launch.render import Job, render
from bitlm_dist.launch.snapshot import save_code
from bitlm_dist.launch.supervisor import SETTINGS
from bitlm_dist.strict_json import to_json

NODE_NAME_PATTERN = re.compile(r"[\w.\[\]-]+")
JOBS = "jobs"  # ids of the run's jobs, one per line
SCRIPT = "job.sh"  # the submitted batch script
MOUNT_SEPARATORS = set(",: ")  # have a meaning for container runtimes in a list of mounts


@dataclass(frozen=True)
class SubmittedJob:
    """A queued job and its run folder."""

    run: Path
    job: str


@dataclass(frozen=True)
class LocalJob:
    """Ranks on this machine, and their environment variables."""

    num_ranks: int
    env: dict[str, str]


def build_job(config: Config, cluster: Cluster, num_nodes: int, exclude: tuple[str, ...]) -> Job:
    """Check a config with absolute paths against a cluster, and build the job to render.

    Raises:
        UserError: data are not set or missing, the ranks do not fit the layout, or a container
            cannot mount a path.
    """
    from bitlm_dist.data.manifest import read_manifest
    from bitlm_dist.parallel.layout import build_layout, resolve_micro_batch_size

    if config.data.path is None:
        raise UserError("data.path is not set: name the folder that `bitlm prep` wrote")
    for node in exclude:
        if not NODE_NAME_PATTERN.fullmatch(node):
            raise UserError(f"--exclude {node!r} is not a node name")

    # raise now what would otherwise end the job in its first minute
    layout = build_layout(config.parallel, num_nodes * cluster.ranks_per_node, 0)
    resolve_micro_batch_size(config, layout)

    folders = [
        config.data.path,
        *(source.path for source in config.data.sources),
        config.distillation.teacher,
        config.data.cache,
    ]
    folders.append(external_checkpoint_folder(config))
    data = tuple(dict.fromkeys(folder for folder in folders if folder is not None))
    for folder in data[:1]:
        read_manifest(folder)

    if not str(config.run.dir).isprintable():
        raise UserError(
            f"run.dir = {config.run.dir!r}: choose a name without line breaks and the like"
        )

    if cluster.container:
        for folder in (config.run.dir, *data):
            if set(str(folder)) & MOUNT_SEPARATORS:
                raise UserError(
                    f"{folder}: a container takes no folder with a comma, colon or blank in its "
                    "name"
                )

    return Job(config.run.dir, data, num_nodes, cluster, exclude)


def external_checkpoint_folder(config: Config) -> Path | None:
    """Folder outside the run folder that holds the checkpoints; None if they are inside."""
    link = config.run.dir / "checkpoints"
    return config.checkpoint.dir or (link.resolve() if link.is_symlink() else None)


def check_can_start(job: Job) -> None:
    """Check that the run folder is free for this run.

    Raises:
        UserError: it holds other files, or another job of the run is queued or running.
    """
    attempts.check_run_folder(job.run_folder, job.data_folders)
    _check_no_active_job(job.run_folder)


def write_job_files(job: Job, config: Config, is_local: bool = False) -> None:
    """Write the files that the job needs into the run folder.

    If they cannot be written, what this call has created is removed.

    Args:
        job: the job.
        config: its config, with absolute paths.
        is_local: the job runs on this machine, without Slurm.

    Raises:
        OSError: the run folder cannot be written.
    """
    folder = job.run_folder / LAUNCH
    checkpoints = external_checkpoint_folder(config)
    if checkpoints is not None:
        attempts.check_checkpoint_link(config.run.dir)
        _make_checkpoint_folder(checkpoints)

    settings = {
        **job_settings(job, is_local),
        "checkpoints": None if checkpoints is None else str(checkpoints),
    }
    with _removing_new_files_on_error(folder):
        write_atomically(folder / SETTINGS, to_json(settings, indent=1) + "\n")
        write_atomically(folder / "config.yaml", to_yaml(config))
        save_code(folder)


@contextmanager
def _removing_new_files_on_error(folder: Path) -> Iterator[None]:
    """Remove what a failed start has created in a folder, and the folders that it has made."""
    old_files = set(folder.iterdir()) if folder.is_dir() else set()
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except OSError:
        for path in set(folder.iterdir()) - old_files if folder.is_dir() else ():
            path.unlink()
        for path in new_folders:
            with suppress(OSError):  # never made, or used by somebody else by now
                path.rmdir()
        raise


def _make_checkpoint_folder(checkpoints: Path) -> None:
    """Create the external checkpoint folder, because containers can only mount one that exists."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"checkpoint.dir = {checkpoints} cannot be written ({error}): choose another folder"
        ) from error


def job_settings(job: Job, is_local: bool = False) -> dict[str, Any]:
    """Settings of the supervisor inside the job, and of `bitlm launch resume` for a local one."""
    cluster = job.cluster
    local = {"ranks": cluster.ranks_per_node, "env": cluster.env}
    return {
        "submission": _submission_time(),
        "launcher": cluster.launcher,
        "local": local if is_local else None,
        "exclude": job.exclude,
        "max_restarts": cluster.max_restarts,
        "pause": cluster.restart_backoff,
        "gpus_per_node": cluster.gpus_per_node,
        "preflight": cluster.preflight.model_dump(),
        "limits": asdict(Limits(**cluster.watch.model_dump())),
    }


def submit_job(job: Job, config: Config) -> SubmittedJob:
    """Write the job's files and queue it. If Slurm refuses the script, nothing is written.

    Raises:
        UserError: Slurm refuses the script, or another job of the run is queued or running.
    """
    slurm.check_walltime(job.cluster.partition, job.cluster.walltime_seconds)
    check_can_start(job)

    # tried outside the run folder, so that a refusal leaves no folder behind
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as tried:
        tried.write(render(job))
        tried.flush()
        slurm.validate_script(Path(tried.name))

    with _submission_lock(job.run_folder):
        write_job_files(job, config)
        write_atomically(job.run_folder / LAUNCH / SCRIPT, render(job))
        return SubmittedJob(job.run_folder, _queue_job(job.run_folder))


def resume_run(run: Path) -> SubmittedJob:
    """Queue the saved script again.

    Raises:
        UserError: the run was not launched or has been moved, or a job of it is queued or running.
    """
    check_not_moved(run, "slurm")
    with _submission_lock(run):
        _start_new_submission(run)
        return SubmittedJob(run, _queue_job(run))


def resume_local_run(run: Path) -> LocalJob:
    """Prepare a local run for being started again by :func:`~bitlm_dist.launch.local.run_local`.

    Raises:
        UserError: the run has been moved, is being trained, or an older version started it.
    """
    local = supervisor.load_settings(run).get("local")
    if local is None:
        logs = (run / LAUNCH).glob("attempts/*/logs/rank-*.log")
        num_ranks = max((int(log.stem.partition("-")[2]) + 1 for log in logs), default=1)
        raise UserError(
            f"{run} was started by an older version: "
            f"use `bitlm launch local {run}/launch/config.yaml -n {num_ranks}`"
        )

    check_not_moved(run, "local")
    with _submission_lock(run):
        _start_new_submission(run)
    return LocalJob(local["ranks"], local["env"])


def check_not_moved(run: Path, command: str) -> None:
    """Refuse a run that was moved, as its saved files name the original folder.

    Args:
        run: the run folder.
        command: of `bitlm launch`, which started the run.

    Raises:
        UserError: it was moved.
    """
    original_folder = launched_config(run).run.dir
    if not original_folder.exists() or not original_folder.samefile(run):
        raise UserError(
            f"{run} was launched as {original_folder} and has been moved: "
            f"use `bitlm launch {command} {run}/config.yaml`"
        )


def launched_config(run: Path) -> Config:
    """The config that a run was launched with; its paths are absolute."""
    return load_config(run / LAUNCH / "config.yaml").config


def is_local(run: Path) -> bool:
    """True if the last command that started a run was `bitlm launch local`.

    Raises:
        UserError: the run was not launched.
    """
    folder = launch_folder(run)
    # older versions did not record it, but wrote no script
    return bool(supervisor.load_settings(run).get("local")) or not (folder / SCRIPT).is_file()


def _start_new_submission(run: Path) -> None:
    """Restart the count of attempts without progress."""
    settings = {**supervisor.load_settings(run), "submission": _submission_time()}
    write_atomically(run / LAUNCH / SETTINGS, to_json(settings, indent=1) + "\n")


def cancel_local_run(run: Path) -> int | None:
    """Checkpoint and stop a local run.

    Returns:
        Number of the attempt that will end, 0 between two attempts; None if nothing runs.
    """
    all_attempts = attempts.read_attempts(run)
    if not is_running(run, all_attempts):
        return None

    write_atomically(run / LAUNCH / CANCELLED_FILE, "")
    if not all_attempts or all_attempts[-1].outcome:
        return 0
    attempts.request_stop(attempts.attempt_folder(run, all_attempts[-1].number), "cancelled")
    return all_attempts[-1].number


def cancel_run(run: Path) -> list[str]:
    """Checkpoint and stop a run on Slurm, and remove its queued jobs.

    Returns:
        Ids of the jobs that were queued or running.
    """
    launch_folder(run)

    # first, so that a job which is just being requeued sees it, too
    write_atomically(run / LAUNCH / CANCELLED_FILE, "")

    active = [job for job in job_ids(run) if is_active(job)]
    for job in active:
        running = slurm.show_job(job).get("JobState") == "RUNNING"
        slurm.cancel_job(job, *(["--batch", "--signal=USR2"] if running else []))
    return active


def launch_folder(run: Path) -> Path:
    """Folder of the launcher's files.

    Raises:
        UserError: the run was not launched.
    """
    folder = run / LAUNCH
    if not (folder / SETTINGS).is_file():
        raise UserError(
            f"{run} was not launched: start it with `bitlm launch slurm` or `bitlm launch local`"
        )
    return folder


def job_ids(run: Path) -> list[str]:
    """Ids of all jobs of the run, oldest first."""
    file = run / LAUNCH / JOBS
    queued = file.read_text().split() if file.is_file() else []
    started = [attempt.job for attempt in attempts.read_attempts(run) if attempt.job]

    # with several clusters `sbatch --parsable` prints ID;CLUSTER
    return list(dict.fromkeys(job.partition(";")[0] for job in (*queued, *started)))


def is_active(job: str) -> bool:
    """True if a job is queued or running."""
    state = slurm.show_job(job).get("JobState", "")
    return bool(state) and state not in slurm.TERMINAL_STATES


def _check_no_active_job(run: Path) -> None:
    for job in job_ids(run):
        if is_active(job):
            raise UserError(
                f"job {job} of {run} is queued or running: "
                f"`bitlm launch status {run}` shows it, `cancel` ends it"
            )


def _queue_job(run: Path) -> str:
    """Submit the saved script, without the bad nodes, and record the job id."""
    bad = supervisor.excluded_nodes(run)
    job = slurm.submit_script(
        run / LAUNCH / SCRIPT, *([f"--exclude={','.join(bad)}"] if bad else [])
    )

    with (run / LAUNCH / JOBS).open("a") as stream:
        stream.write(f"{job}\n")
    return job


@contextmanager
def _submission_lock(run: Path) -> Iterator[None]:
    """Hold the run, so that nobody else can submit it, and lift an earlier cancellation."""
    (run / LAUNCH).mkdir(parents=True, exist_ok=True)
    with (run / LAUNCH / LAUNCHER_LOCK).open("w") as lock:
        if not try_lock(lock):
            raise UserError(
                f"{run} is being submitted or trained by another `bitlm launch`: wait for it"
            )

        # again under the lock: another submission may have come first
        _check_no_active_job(run)
        (run / LAUNCH / CANCELLED_FILE).unlink(missing_ok=True)
        yield


def _submission_time() -> str:
    return f"{time.time():.3f}"
