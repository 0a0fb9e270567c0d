"""How a launched run is: from the batch system, its attempts and its metrics."""

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitlm_dist.launch import agent, attempts, slurm, submit

from bitlm_dist.config import Config
from bitlm_dist.config_loading import absolute, load, read_run
from bitlm_dist.errors import UserError

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"  # as bitlm_dist.training.metrics has them, whose import brings torch
RECENT = 20  # steps whose mean speed tells when it will be done
TAIL = 20  # lines of a log


@dataclass(frozen=True)
class Status:
    """A run at one moment.

    Attributes:
        state: of the job in Slurm's words, or running, ended; with the reason it waits, if it does.
        job: its number, empty on a single machine.
        attempts: starts so far.
        last: what came of the newest attempt that has ended.
        step, steps: done, and in all.
        tokens_per_second: positions, of the last steps.
        predicted_tokens_per_second: tokens that carried loss, of the last steps.
        checkpoint: newest complete one, -1: none.
        seconds_left: of training at that speed; None: not known.
        excluded: nodes found bad.
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
    """Raises UserError where ``run`` was not launched."""
    folder = submit.launched(run)
    every, numbers = attempts.read_attempts(run), submit.jobs(run)
    config = load(folder / "config.yaml").config
    recent = list(deque(_lines(run / METRICS), maxlen=RECENT))
    step = int(recent[-1]["step"]) if recent else 0
    rate = _rate(recent, "tokens")
    left = (config.training.steps - step) * config.training.global_batch_tokens
    ended = [attempt for attempt in every if attempt.outcome]
    return Status(
        state=_state(run, numbers, every),
        job=numbers[-1] if numbers else "",
        attempts=len(every),
        last=f"{ended[-1].outcome}: {ended[-1].reason}" if ended else "",
        step=step,
        steps=config.training.steps,
        tokens_per_second=rate,
        predicted_tokens_per_second=_rate(recent, "predicted_tokens"),
        checkpoint=attempts.newest_checkpoint(run),
        seconds_left=left / rate if rate else None,
        excluded=agent.left_out(run),
    )


def _rate(recent: list[dict[str, Any]], name: str) -> float | None:
    """A count per second of training; None where there are no two steps, or an older version did not count it."""
    if len(recent) < 2:
        return None
    first, last = recent[0], recent[-1]
    spent = last["seconds"] - first["seconds"]
    if spent <= 0 or first.get(name) is None or last.get(name) is None:
        return None
    return float(last[name] - first[name]) / spent


def _state(run: Path, numbers: list[str], every: list[attempts.Attempt]) -> str:
    if not numbers:
        return _state_here(run, every)
    found = slurm.show(numbers[-1])
    if not found:
        return "unknown to Slurm by now"
    waits = found["JobState"] == "PENDING" and found.get("Reason", "None") != "None"
    return f"{found['JobState']} ({found['Reason']})" if waits else found["JobState"]


def _state_here(run: Path, every: list[attempts.Attempt]) -> str:
    """Without a batch system: by what the last attempt left."""
    if not every or every[-1].outcome:
        return "ended" if every else "not begun"
    beats = (attempts.folder_of(run, every[-1].number) / "beats").glob("rank-*")
    newest = max((beat.stat().st_mtime for beat in beats), default=every[-1].began)
    silent = time.time() - newest
    return "running" if silent < every[-1].limits.frozen else f"no sign of life for {silent:,.0f} s: its launcher was ended"


def is_trained(run: Path, config: Config) -> bool:
    """Whether a run of this very config, with absolute paths, has nothing left to do."""
    if not (run / "config.yaml").is_file() or absolute(read_run(run)) != config:
        return False
    steps, every = config.training.steps, config.evaluation.every_steps
    evaluated = max((entry["step"] for entry in _lines(run / EVALUATIONS)), default=0)
    newest = attempts.newest_checkpoint(run)
    return newest >= steps and (not every or evaluated >= steps) and _is_healthy(run / "checkpoints" / f"step-{newest:08d}")


def _is_healthy(checkpoint: Path) -> bool:
    """What :func:`bitlm_dist.checkpoint.store.read_health` says, without torch; a run that ended in NaN has to say so again."""
    for name, key in (("health.json", "healthy"), ("state.json", "finite")):
        try:
            return bool(json.loads((checkpoint / name).read_text())[key])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return True


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with file.open() as stream:
        for line in stream:
            try:
                yield json.loads(line)
            except ValueError:
                continue  # being written


def log_of(run: Path, rank: int | None, number: int | None) -> tuple[str, list[str]]:
    """The end of a log: that of ``rank``; without one, that of the rank which failed first, else of rank 0.

    Args:
        number: of the attempt; None: the newest.

    Raises:
        UserError: no such attempt or log.
    """
    submit.launched(run)
    every = attempts.read_attempts(run)
    chosen = next((attempt for attempt in reversed(every) if number in (None, attempt.number)), None)
    if chosen is None:
        raise UserError(
            f"{run} has no attempt {number or ''}: `bitlm launch status {run}` says how many there are".replace("  ", " ")
        )
    folder = attempts.folder_of(run, chosen.number)
    failure = attempts.first_failure(folder)
    first = attempts.hung_rank(folder)
    first = first if first is not None else int(failure["rank"]) if failure else 0
    rank = first if rank is None else rank
    file = folder / "logs" / f"rank-{rank}.log"
    title = f"attempt {chosen.number}, rank {rank}"
    if failure and failure["rank"] == rank:
        title += f", the first to fail, at {time.strftime('%H:%M:%S', time.localtime(failure['time']))}: {failure['message']}"
    if not file.is_file():
        raise UserError(f"{file} is not there: the rank never began, see the job's own log in {run}/launch")
    return title, file.read_text(errors="replace").splitlines()[-TAIL:]
