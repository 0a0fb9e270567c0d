"""Check that a config can start to train: its data, its packages, and its run folder.

A folder is free for a run if it is empty, or that run's own. Imports no torch, so that a refusal
comes at once.
"""

from pathlib import Path
from typing import Any

from bitlm_dist.config import Config
from bitlm_dist.config_loading import (
    config_paths,
    flatten,
    load_run_config,
    with_absolute_paths,
)
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.disks import try_to_write
from bitlm_dist.errors import UserError, os_error_message
from bitlm_dist.files import missing_folders, remove_empty_folders
from bitlm_dist.launch.attempts import FILES_BEFORE_FIRST_STEP, check_run_folder
from bitlm_dist.paths import absolute_path
from bitlm_dist.training.checkpoint_folder import CHECKPOINTS, checkpoint_steps
from bitlm_dist.training.metrics import LOG_FILES, METRICS
from bitlm_dist.training.trained_files import CODES, TOKENIZER
from bitlm_dist.training.wandb_log import WANDB, check_wandb

# Prefixes of keys that may change when a run resumes. Any other change would make it another run.
CHANGEABLE_KEYS = (
    "run.",
    "checkpoint.",
    "evaluation.",
    "sampling.",
    "logging.",
    "parallel.",
    "head.engine",
    "head.zero_stage",
    "head.offload",
    "optimizer.sharded",
    "training.deterministic",
    "data.cache",
    "data.cache_limit",
    "data.workers",
    "data.path",
    "data.new_mixture",
)
STEPS_KEY = "training.steps"
GLOBAL_BATCH_KEY = "training.global_batch_tokens"
SOURCES_KEY = "data.sources"
# Keys that may change if the config consents with another key.
CONSENT_KEYS = {
    GLOBAL_BATCH_KEY: "checkpoint.new_global_batch",
    SOURCES_KEY: "data.new_mixture",
}
# What a start may leave that was killed, or ended by a signal, before the end of its first step.
FILES_OF_A_START = (
    "config.yaml",
    "environment.json",
    CODES,
    TOKENIZER,
    "tensorboard",
    "wandb",
    WANDB,
    CHECKPOINTS,
    *LOG_FILES,
    *FILES_BEFORE_FIRST_STEP,
)


def check_start(config: Config, rank: int, resume: bool = True) -> None:
    """Check what can be told from files and packages alone.

    Args:
        config: the config.
        rank: rank of this process; only the first one uses the run folder.
        resume: resume from the latest checkpoint; False: there must be none.

    Raises:
        UserError: the data are missing or unfinished, a package is missing, or the run folder is
            another run's, has a checkpoint against ``resume``, or cannot be written. Nothing was
            changed.
    """
    check_wandb(config.logging)
    if config.data.path is None:
        raise UserError("data.path is not set: name the folder that `bitlm prep` wrote")
    read_manifest(config.data.path)
    if config.distillation.teacher is not None:
        load_run_config(config.distillation.teacher)

    run = config.run.dir
    try:
        steps = [] if resume else checkpoint_steps(run)
        if steps:
            raise UserError(
                f"run.dir = {run} holds checkpoints up to step {steps[-1]}: "
                "drop --no-resume or choose another"
            )
        if rank > 0:
            return
        check_claim(run, config)
        _check_writable(run)
    except OSError as error:
        raise run_folder_error(run, error) from error


def run_folder_error(run: Path, error: OSError) -> UserError:
    """The error for a run folder that the system does not let us use."""
    where = "" if error.filename else f" = {run}"  # the system's text names the path, or none
    return UserError(f"run.dir{where} cannot be used: {os_error_message(error)}")


def _check_writable(run: Path) -> None:
    """Make the folder and a file in it, and remove both.

    Raises:
        OSError: it cannot be written.
    """
    created = missing_folders(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        try_to_write(run)
    except OSError as error:
        if run.is_dir():  # the user knows the folder, not the file that was tried
            error.filename = str(run)
        raise
    finally:
        remove_empty_folders(created)


def has_started(run: Path) -> bool:
    """True if a folder holds a run that has taken a step, which no other config may continue.

    A start that failed before its first step leaves the folder to the next one. A folder with
    other files, such as an exported model, counts as started.

    Raises:
        UserError: the run's checkpoints are behind a broken link.
    """
    if not (run / "config.yaml").is_file():
        return False
    if checkpoint_steps(run):
        return True

    metrics = run / METRICS
    return (metrics.is_file() and metrics.stat().st_size > 0) or any(
        file.name not in FILES_OF_A_START and file.name[0] != "." for file in run.iterdir()
    )


def check_claim(run: Path, config: Config) -> None:
    """Check that a folder is free, or holds the run of this config.

    Raises:
        UserError: it holds a run with another config, or files that belong to no run.
    """
    if has_started(run):
        _check_same_config(run, load_run_config(run), config)
    check_run_folder(absolute_path(run), config_paths(config))


def _check_same_config(run: Path, saved: Config, current: Config) -> None:
    old, new = (_comparable(config) for config in (saved, current))
    for key, value in new.items():
        # Other schedules stretch over all steps, so a longer run would have trained otherwise.
        is_allowed_lengthening = key == STEPS_KEY and current.optimizer.schedule == "constant"
        if old.get(key) == value or key.startswith(CHANGEABLE_KEYS) or is_allowed_lengthening:
            continue

        if not is_change_allowed(key, current):
            note = f" ({CONSENT_KEYS[key]} = true allows it)" if key in CONSENT_KEYS else ""
            note = " (the schedule depends on it)" if key == STEPS_KEY else note
            raise UserError(
                f"run.dir = {run} holds a run with {key} = {old.get(key)}, "
                f"now {value}{note}: choose another run.dir or the same value"
            )


def _comparable(config: Config) -> dict[str, Any]:
    """Values by dotted key, without the sources' paths: their contents are compared elsewhere."""
    values = dict(flatten(with_absolute_paths(config).model_dump(mode="json")))
    values[SOURCES_KEY] = [{**source, "path": "…"} for source in values[SOURCES_KEY]]
    return values


def is_change_allowed(key: str, config: Config) -> bool:
    """True if a config consents to the change of a key that a run keeps otherwise."""
    return key in CONSENT_KEYS and bool(dict(flatten(config.model_dump()))[CONSENT_KEYS[key]])
