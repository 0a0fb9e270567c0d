"""Submission of runs to Slurm, and the commands on a submitted run: resume, cancel, list jobs."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bitlm_dist.config import Config
from bitlm_dist.config_loading import load_config
from bitlm_dist.errors import UserError
from bitlm_dist.files import try_lock, write_atomically
from bitlm_dist.launch import attempts, slurm, supervisor
from bitlm_dist.launch.attempts import CANCELLED, CANCELLED_FILE, LAUNCH
from bitlm_dist.launch.job_files import submission_time, write_job_files
from bitlm_dist.launch.liveness import (
    LAUNCHER_LOCK,
    being_trained_error,
    is_launcher_alive,
    is_running,
)
from bitlm_dist.launch.render import Job, render
from bitlm_dist.launch.supervisor import SETTINGS
from bitlm_dist.paths import relative_to_note
from bitlm_dist.strict_json import to_json

JOBS = "jobs"  # ids of the run's jobs, one per line
SCRIPT = "job.sh"  # the submitted batch script


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


def check_can_start(job: Job) -> None:
    """Check that the run folder is free for this run.

    Raises:
        UserError: it holds other files, another `bitlm launch local` trains the run, or another
            job of it is queued or running.
    """
    attempts.check_run_folder(job.run_folder, job.data_folders)
    if is_launcher_alive(job.run_folder):
        raise being_trained_error(job.run_folder)
    _check_no_active_job(job.run_folder)


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
    settings = {**supervisor.load_settings(run), "submission": submission_time()}
    write_atomically(run / LAUNCH / SETTINGS, to_json(settings, indent=1) + "\n")


def cancel_local_run(run: Path) -> int | None:
    """Checkpoint and stop a local run.

    Returns:
        Number of the attempt that will end, 0 between two attempts; None if nothing runs.
    """
    if not is_running(run, attempts.read_attempts(run)):
        return None

    write_atomically(run / LAUNCH / CANCELLED_FILE, "")
    all_attempts = attempts.read_attempts(run)  # anew: one may have begun before it saw the file
    if not all_attempts or all_attempts[-1].outcome:
        return 0
    attempts.request_stop(attempts.attempt_folder(run, all_attempts[-1].number), CANCELLED)
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
    if not run.is_dir():
        raise UserError(f"{run}{relative_to_note(run)} does not exist")
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
