"""Status of a launched run, from the batch system, its attempts and its metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitlm_dist.checkpoint.steps import folder_of, read_health
from bitlm_dist.config import Config
from bitlm_dist.config_loading import load_config, load_run_config, with_absolute_paths
from bitlm_dist.launch import attempts, slurm, submit, supervisor
from bitlm_dist.launch.attempts import Attempt
from bitlm_dist.launch.history import history_of
from bitlm_dist.launch.liveness import is_running, silent_seconds
from bitlm_dist.launch.records import EVALUATIONS, METRICS, last_records, read_jsonl

NUM_RECENT_STEPS = 20  # for the mean speed, from which the remaining time follows
RUNNING = "running"
WAITING = "waiting to start the next attempt"
MEMORY_KEYS = (
    "host_memory_bytes",
    "host_memory_peak_bytes",
    "device_memory_bytes",
    "device_memory_peak_bytes",
)
_TRAINING_STATES = (RUNNING, "RUNNING")  # local, and Slurm's


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
        seconds_left: remaining training time at the current speed; None if unknown, or if the run
            is not running.
        excluded: nodes that are no longer used.
        loss: training loss of the latest step.
        validation: the latest evaluation of training, in bits per byte of text.
        best_validation: the best one so far.
        best_validation_step: its step.
        seconds: all attempts together, without the waits between them.
        goodput: share of ``seconds`` that was spent in steps that a checkpoint holds.
        data_wait: share of the time of the latest steps that was spent waiting for data.
        host_memory_bytes: memory of rank 0's process; so are the next three.
        host_memory_peak_bytes: its maximum.
        device_memory_bytes: memory on its GPU.
        device_memory_peak_bytes: its maximum.
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
    loss: float | None
    validation: float | None
    best_validation: float | None
    best_validation_step: int | None
    seconds: float
    goodput: float | None
    data_wait: float | None
    host_memory_bytes: int | None
    host_memory_peak_bytes: int | None
    device_memory_bytes: int | None
    device_memory_peak_bytes: int | None


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
    recent = last_records(run / METRICS, NUM_RECENT_STEPS)
    last = recent[-1] if recent else {}
    step = int(last.get("step", 0))
    rate = _rate(recent, "tokens")
    state = _job_state(run, job_ids, all_attempts)
    history = history_of(run, all_attempts)

    return Status(
        state=state,
        job=job_ids[-1] if job_ids else "",
        attempts=len(all_attempts),
        last=f"{ended[-1].outcome}: {ended[-1].reason}" if ended else "",
        step=step,
        steps=config.training.steps,
        tokens_per_second=rate,
        predicted_tokens_per_second=_rate(recent, "predicted_tokens"),
        checkpoint=attempts.latest_checkpoint_step(run),
        seconds_left=_seconds_left(config, step, rate, state),
        excluded=supervisor.excluded_nodes(run),
        loss=last.get("loss"),
        **_evaluations(run),
        seconds=history.seconds,
        goodput=history.goodput,
        data_wait=_data_wait(recent),
        **{name: last.get(name) for name in MEMORY_KEYS},
    )


def _seconds_left(config: Config, step: int, rate: float | None, state: str) -> float | None:
    """Remaining training time; None if it is unknown, as nothing trains the run."""
    steps_left = config.training.steps - step
    if steps_left <= 0:
        return 0.0
    if not rate or state not in _TRAINING_STATES:
        return None
    return steps_left * config.training.global_batch_tokens / rate


def _training_evaluations(run: Path) -> list[dict[str, Any]]:
    """Evaluations during training; `bitlm eval` may append ones of other text or other weights."""
    return [
        entry
        for entry in read_jsonl(run / EVALUATIONS)
        if "step" in entry and entry.get("by", "train") == "train"
    ]


def _evaluations(run: Path) -> dict[str, Any]:
    """Latest and best validation score of training, as fields of :class:`Status`."""
    scores: list[tuple[float, int]] = [
        (entry["validation"]["bits_per_byte"], int(entry["step"]))
        for entry in _training_evaluations(run)
        if entry.get("validation", {}).get("bits_per_byte") is not None
    ]
    best = min(scores, default=(None, None))
    return {
        "validation": scores[-1][0] if scores else None,
        "best_validation": best[0],
        "best_validation_step": best[1],
    }


def _data_wait(recent: Sequence[dict[str, Any]]) -> float | None:
    """Share of the time of the latest steps spent waiting for data; None if not recorded."""
    waits = [entry.get("data_wait_seconds") for entry in recent[1:]]
    known = [wait for wait in waits if wait is not None]
    elapsed = recent[-1]["seconds"] - recent[0]["seconds"] if recent else 0.0
    if not known or len(known) < len(waits) or elapsed <= 0:
        return None
    return min(1.0, sum(known) / elapsed)


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


def _job_state(run: Path, job_ids: list[str], all_attempts: list[Attempt]) -> str:
    if submit.is_local(run) or not job_ids:
        return _local_state(run, all_attempts)

    job = slurm.show_job(job_ids[-1])
    if not job:
        return "unknown to Slurm by now"

    waits = job["JobState"] == "PENDING" and job.get("Reason", "None") != "None"
    return f"{job['JobState']} ({job['Reason']})" if waits else job["JobState"]


def _local_state(run: Path, all_attempts: list[Attempt]) -> str:
    """State of a run without a batch system, from its lock and the files of its last attempt."""
    has_ended = bool(all_attempts and all_attempts[-1].outcome)
    if is_running(run, all_attempts):
        return WAITING if has_ended or not all_attempts else RUNNING
    if has_ended or not all_attempts:
        return "ended" if all_attempts else "not begun"

    silent = silent_seconds(run, all_attempts[-1])
    return f"no sign of life for {silent:,.0f} s: its launcher was ended"


def is_active(run: Path) -> bool:
    """True if a run is queued or running, so that another attempt may follow."""
    if submit.is_local(run):
        return is_running(run, attempts.read_attempts(run))
    return any(submit.is_active(job) for job in submit.job_ids(run)[-1:])


def is_trained(run: Path, config: Config) -> bool:
    """True if a run of exactly this config, with absolute paths, is complete."""
    if not (run / "config.yaml").is_file() or with_absolute_paths(load_run_config(run)) != config:
        return False

    steps = config.training.steps
    eval_interval = config.evaluation.every_steps
    evaluated = max((entry["step"] for entry in _training_evaluations(run)), default=0)
    newest = attempts.latest_checkpoint_step(run)

    # A run that ended in NaN is not complete: started again, it must report the divergence again.
    return (
        newest >= steps
        and (not eval_interval or evaluated >= steps)
        and read_health(folder_of(run / "checkpoints", newest)) is not False
    )
