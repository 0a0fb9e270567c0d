"""From a config to a queued job, and what a user does with it afterwards."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitlm_dist.launch import attempts, slurm
from bitlm_dist.launch.agent import SETTINGS
from bitlm_dist.launch.attempts import CANCELLED, LAUNCH, Limits
from bitlm_dist.launch.cluster import Cluster
from bitlm_dist.launch.render import Job, render
from bitlm_dist.launch.snapshot import save_code

from bitlm_dist.config import Config
from bitlm_dist.config_loading import to_yaml
from bitlm_dist.errors import UserError
from bitlm_dist.files import write_atomically

JOBS, SCRIPT = "jobs", "job.sh"  # numbers of the run's jobs, one a line; what is submitted
MOUNT_SIGNS = set(",: ")  # what container runtimes read as signs in a list of mounts


@dataclass(frozen=True)
class Submitted:
    """A queued job."""

    run: Path
    job: str


def absolute(config: Config) -> Config:
    """The config with all its paths absolute: a job begins elsewhere, and again after weeks."""
    document = config.model_dump()
    document["run"]["dir"] = config.run.dir.absolute()
    for section, key in (("data", "path"), ("data", "cache"), ("distillation", "teacher")):
        if document[section][key] is not None:
            document[section][key] = Path(document[section][key]).absolute()
    for source in document["data"]["sources"]:
        source["path"] = Path(source["path"]).absolute()
    return Config.model_validate(document)


def job_of(config: Config, cluster: Cluster, nodes: int, exclude: tuple[str, ...]) -> Job:
    """What to render, for an :func:`absolute` config.

    Raises:
        UserError: data are not set or there, ranks do not fit the layout, or a path does not go into a container.
    """
    from bitlm_dist.data.manifest import read_manifest
    from bitlm_dist.parallel.layout import check_batch, layout_of

    if config.data.path is None:
        raise UserError("data.path is not set: name the folder that `bitlm prep` wrote")
    layout = layout_of(config.parallel, nodes * cluster.ranks_per_node, 0)
    check_batch(config, layout)
    folders = [config.data.path, *(source.path for source in config.data.sources), config.distillation.teacher]
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


def save(job: Job, config: Config) -> None:
    """Write what the job needs into the run folder.

    Raises:
        UserError: the folder holds something else, or another job of the run is queued or running.
    """
    folder = job.run / LAUNCH
    if job.run.exists() and not folder.is_dir() and not (job.run / "config.yaml").is_file() and any(job.run.iterdir()):
        raise UserError(f"run.dir = {job.run} holds files but no run: choose an empty or a new folder")
    _refuse_second(job.run)
    write_atomically(folder / SETTINGS, json.dumps(settings_of(job.cluster), indent=1) + "\n")
    write_atomically(folder / "config.yaml", to_yaml(config))
    save_code(folder)


def settings_of(cluster: Cluster) -> dict[str, Any]:
    """What decides inside the job."""
    return {
        "max_restarts": cluster.max_restarts,
        "pause": cluster.pause,
        "gpus_per_node": cluster.gpus_per_node,
        "preflight": cluster.preflight.model_dump(),
        "limits": asdict(Limits(**cluster.watch.model_dump())),
    }


def submit(job: Job, config: Config) -> Submitted:
    """Save what the job needs and queue it; what Slurm refuses leaves nothing new behind.

    Raises:
        UserError: the script is refused; nothing was queued.
    """
    slurm.check_time(job.cluster.partition, job.cluster.seconds)
    new = not job.run.exists()
    save(job, config)
    script = job.run / LAUNCH / SCRIPT
    write_atomically(script, render(job))
    try:
        slurm.test(script)
    except UserError:
        if new:
            _remove_launch(job.run)
        raise
    (job.run / LAUNCH / CANCELLED).unlink(missing_ok=True)
    return Submitted(job.run, _queue(job.run))


def resume(run: Path) -> Submitted:
    """Queue the saved script again.

    Raises:
        UserError: the run was not launched, or a job of it is queued or running.
    """
    script = launched(run) / SCRIPT
    if not script.is_file():
        raise UserError(f"{run} was launched on a machine without Slurm: run the same `bitlm launch local` again")
    _refuse_second(run)
    (run / LAUNCH / CANCELLED).unlink(missing_ok=True)
    bad = run / LAUNCH / "excluded.json"
    options = [f"--exclude={','.join(json.loads(bad.read_text()))}"] if bad.is_file() else []
    return Submitted(run, _queue(run, *options))


def cancel(run: Path) -> list[str]:
    """Have the run save and end, and take what is queued out of the queue -> the jobs."""
    launched(run)
    write_atomically(run / LAUNCH / CANCELLED, "")
    ended = []
    for job in jobs(run):
        state = slurm.show(job).get("JobState", "")
        if state == "RUNNING":
            slurm.cancel(job, "--batch", "--signal=USR2")
            ended.append(job)
        elif state in ("PENDING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD"):
            slurm.cancel(job)
            ended.append(job)
    return ended


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
    for job in jobs(run)[-1:]:
        if is_active(job):
            raise UserError(f"job {job} of {run} is queued or running: `bitlm launch status {run}` shows it, `cancel` ends it")


def _queue(run: Path, *options: str) -> str:
    job = slurm.submit(run / LAUNCH / SCRIPT, *options)
    with (run / LAUNCH / JOBS).open("a") as stream:
        stream.write(f"{job}\n")
    return job


def _remove_launch(run: Path) -> None:
    for file in (run / LAUNCH).iterdir():
        file.unlink()
    (run / LAUNCH).rmdir()
    run.rmdir()
