"""The job of a run, and the files that it needs in the run folder."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitlm_dist.config import Config
from bitlm_dist.config_loading import config_paths, to_yaml
from bitlm_dist.errors import UserError, os_error_message
from bitlm_dist.files import missing_folders, remove_empty_folders, write_atomically
from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import LAUNCH, Limits
from bitlm_dist.launch.cluster import Cluster
from bitlm_dist.launch.render import Job
from bitlm_dist.launch.snapshot import save_code
from bitlm_dist.launch.supervisor import SETTINGS
from bitlm_dist.strict_json import to_json

NODE_NAME_PATTERN = re.compile(r"[\w.\[\]-]+")
MOUNT_SEPARATORS = set(",: ")  # have a meaning for container runtimes in a list of mounts


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

    folders = [*config_paths(config), external_checkpoint_folder(config)]
    data = tuple(dict.fromkeys(folder for folder in folders if folder is not None))
    read_manifest(config.data.path)

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
    new_folders = missing_folders(folder)
    try:
        yield
    except OSError:
        for path in set(folder.iterdir()) - old_files if folder.is_dir() else ():
            path.unlink()
        remove_empty_folders(new_folders)
        raise


def _make_checkpoint_folder(checkpoints: Path) -> None:
    """Create the external checkpoint folder, because containers can only mount one that exists."""
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"checkpoint.dir = {checkpoints} cannot be used: {os_error_message(error)}"
        ) from error


def job_settings(job: Job, is_local: bool = False) -> dict[str, Any]:
    """Settings of the supervisor inside the job, and of `bitlm launch resume` for a local one."""
    cluster = job.cluster
    local = {"ranks": cluster.ranks_per_node, "env": cluster.env}
    return {
        "submission": submission_time(),
        "launcher": cluster.launcher,
        "local": local if is_local else None,
        "exclude": job.exclude,
        "max_restarts": cluster.max_restarts,
        "pause": cluster.restart_backoff,
        "gpus_per_node": cluster.gpus_per_node,
        "preflight": cluster.preflight.model_dump(),
        "limits": asdict(Limits(**cluster.watch.model_dump())),
    }


def submission_time() -> str:
    """Id of a submission: the time, which differs from all earlier ones."""
    return f"{time.time():.3f}"
