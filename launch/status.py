"""Status of a launched run, from the batch system, its attempts and its metrics."""

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitlm_dist.checkpoint.steps import folder_of, read_health
from bitlm_dist.config import Config
from bitlm_dist.config_loading import load_config, load_run_config, with_absolute_paths
from bitlm_dist.errors import UserError
from bitlm_dist.launch import attempts, slurm, submit, supervisor

# the same names as in bitlm_dist.training.metrics, which would import torch
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
NUM_RECENT_STEPS = 20  # for the mean speed, from which the remaining time follows
NUM_LOG_LINES = 20


@dataclass(frozen=True)
class Status:
    """Snapshot of a run.

    Attributes:
        state: Slurm's state of the job, with the reason if it is pending; without Slurm, running or
            ended.
        job: job id; empty on a single machine.
        attempts: number of attempts so far.
        last: outcome of the latest attempt that has ended.
        step: number of completed steps.
        steps: number of steps of the whole run.
        tokens_per_second: positions per second over the latest steps.
        predicted_tokens_per_second: tokens that carry loss, per second over the latest steps.
        checkpoint: step of the latest complete checkpoint; -1 if there is none.
        seconds_left: remaining training time at the current speed; None if unknown.
        excluded: nodes that are no longer used.
    """

    state: str
    job: str
    attempts: int
    last: str
    step: int
    steps: int
    tokens_per_second: float | None
    predicted_tokens_per_second: float | None
    checkpoint: int
    seconds_left: float | None
    excluded: list[str]


def status_of(run: Path) -> Status:
    """Collect the status of a run.

    Raises:
        UserError: ``run`` was not launched.
    """
    folder = submit.launch_folder(run)
    all_attempts = attempts.read_attempts(run)
    job_ids = submit.job_ids(run)
    ended = [attempt for attempt in all_attempts if attempt.outcome]
    config = load_config(folder / "config.yaml").config

    # speed of the latest steps, and what it predicts
    recent = list(deque(_read_jsonl(run / METRICS), maxlen=NUM_RECENT_STEPS))
    step = int(recent[-1]["step"]) if recent else 0
    rate = _rate(recent, "tokens")
    num_tokens_left = (config.training.steps - step) * config.training.global_batch_tokens

    return Status(
        state=_job_state(run, job_ids, all_attempts),
        job=job_ids[-1] if job_ids else "",
        attempts=len(all_attempts),
        last=f"{ended[-1].outcome}: {ended[-1].reason}" if ended else "",
        step=step,
        steps=config.training.steps,
        tokens_per_second=rate,
        predicted_tokens_per_second=_rate(recent, "predicted_tokens"),
        checkpoint=attempts.latest_checkpoint_step(run),
        seconds_left=num_tokens_left / rate if rate else None,
        excluded=supervisor.excluded_nodes(run),
    )


def _rate(recent: list[dict[str, Any]], name: str) -> float | None:
    """Increase of a metrics field per second of training.

    Returns:
        The rate; None if there are fewer than two steps, or an older version did not count it.
    """
    if len(recent) < 2:
        return None

    first = recent[0]
    last = recent[-1]
    elapsed = last["seconds"] - first["seconds"]

    if elapsed <= 0 or first.get(name) is None or last.get(name) is None:
        return None
    return float(last[name] - first[name]) / elapsed


def _job_state(run: Path, job_ids: list[str], all_attempts: list[attempts.Attempt]) -> str:
    if not job_ids:
        return _local_state(run, all_attempts)

    job = slurm.show_job(job_ids[-1])
    if not job:
        return "unknown to Slurm by now"

    waits = job["JobState"] == "PENDING" and job.get("Reason", "None") != "None"
    return f"{job['JobState']} ({job['Reason']})" if waits else job["JobState"]


def _local_state(run: Path, all_attempts: list[attempts.Attempt]) -> str:
    """State of a run without a batch system, from the files of its last attempt."""
    if not all_attempts or all_attempts[-1].outcome:
        return "ended" if all_attempts else "not begun"

    beats = (attempts.attempt_folder(run, all_attempts[-1].number) / "beats").glob("rank-*")
    newest = max((beat.stat().st_mtime for beat in beats), default=all_attempts[-1].began)
    silent = time.time() - newest

    return (
        "running"
        if silent < all_attempts[-1].limits.heartbeat_timeout
        else f"no sign of life for {silent:,.0f} s: its launcher was ended"
    )


def is_trained(run: Path, config: Config) -> bool:
    """True if a run of exactly this config, with absolute paths, is complete."""
    if not (run / "config.yaml").is_file() or with_absolute_paths(load_run_config(run)) != config:
        return False

    steps = config.training.steps
    eval_interval = config.evaluation.every_steps
    evaluated = max((entry["step"] for entry in _read_jsonl(run / EVALUATIONS)), default=0)
    newest = attempts.latest_checkpoint_step(run)

    # A run that ended in NaN is not complete: started again, it must report the divergence again.
    return (
        newest >= steps
        and (not eval_interval or evaluated >= steps)
        and read_health(folder_of(run / "checkpoints", newest)) is not False
    )


def _read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return

    with file.open() as stream:
        for line in stream:
            try:
                yield json.loads(line)
            except ValueError:
                continue  # the last line may be half-written


def read_log_tail(run: Path, rank: int | None, attempt_number: int | None) -> tuple[str, list[str]]:
    """Read the end of a rank's log.

    Args:
        run: the run folder.
        rank: global rank; None: the rank that failed first, else rank 0.
        attempt_number: number of the attempt; None: the latest.

    Returns:
        A title, and the last lines of the log.

    Raises:
        UserError: the attempt or the log does not exist.
    """
    submit.launch_folder(run)
    all_attempts = attempts.read_attempts(run)
    chosen = next(
        (attempt for attempt in reversed(all_attempts) if attempt_number in (None, attempt.number)),
        None,
    )
    if chosen is None:
        # without a number the text would hold two blanks
        raise UserError(
            f"{run} has no attempt {attempt_number or ''}: "
            f"`bitlm launch status {run}` says how many there are".replace("  ", " ")
        )

    # a rank that hangs makes others fail, so it comes before them
    folder = attempts.attempt_folder(run, chosen.number)
    failure = attempts.first_failure(folder)
    failed_rank = attempts.hung_rank(folder)
    failed_rank = failed_rank if failed_rank is not None else int(failure["rank"]) if failure else 0
    rank = failed_rank if rank is None else rank

    file = folder / "logs" / f"rank-{rank}.log"
    title = f"attempt {chosen.number}, rank {rank}"
    if failure and failure["rank"] == rank:
        clock = time.strftime("%H:%M:%S", time.localtime(failure["time"]))
        title += f", the first to fail, at {clock}: {failure['message']}"

    if not file.is_file():
        raise UserError(
            f"{file} is not there: the rank never started, see the job's own log in {run}/launch"
        )
    return title, file.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:]
