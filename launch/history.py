"""Timeline of a run: what each attempt achieved, what was lost, and how much time was of use."""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import Attempt
from bitlm_dist.launch.records import METRICS, parse_records

_STEP = re.compile(r'\{"step": (\d+),')


@dataclass(frozen=True)
class AttemptHistory:
    """What became of an attempt.

    Attributes:
        attempt: number, counted from 1.
        job: job id; empty on a single machine.
        began: start time, seconds since 1970.
        ended: end time, or time of the last sign of life if its launcher was killed; None while it
            runs.
        outcome: an :class:`~bitlm_dist.launch.attempts.Outcome`; empty until one is recorded.
        reason: the outcome in words.
        first_step: step of the checkpoint that it resumed from; 0: from the beginning.
        last_step: last step that it took; None if an older version did not record it.
        saved_step: step of the latest checkpoint at its end.
        steps_lost: steps that it took and that no checkpoint holds, so that they are taken again;
            None if unknown, or while it runs.
        seconds: from its start to its end.
        lasting_seconds: time in steps that a checkpoint holds; None if unknown.
    """

    attempt: int
    job: str
    began: float
    ended: float | None
    outcome: str
    reason: str
    first_step: int
    last_step: int | None
    saved_step: int
    steps_lost: int | None
    seconds: float
    lasting_seconds: float | None


@dataclass(frozen=True)
class History:
    """The attempts of a run, and their sums.

    Attributes:
        attempts: oldest first.
        seconds: all attempts together, without the waits between them.
        steps_lost: all attempts together, as far as known.
        goodput: share of ``seconds`` that was spent in steps that a checkpoint holds. Starts,
            saves, evaluations and repeated steps are the rest. None if unknown.
    """

    attempts: list[AttemptHistory]
    seconds: float
    steps_lost: int
    goodput: float | None


def history_of(run: Path, all_attempts: Iterable[Attempt] | None = None) -> History:
    """Collect the history of a launched run.

    Args:
        run: the run folder.
        all_attempts: its attempts, if they were read already.
    """
    read = attempts.read_attempts(run) if all_attempts is None else list(all_attempts)
    latest = attempts.latest_checkpoint_step(run)
    boundaries = {attempt.checkpoint for attempt in read} | {attempt.reached for attempt in read}
    step_seconds = _seconds_until(run, boundaries | {latest})

    histories = [_history_of_attempt(run, attempt, latest, step_seconds) for attempt in read]
    seconds = sum(history.seconds for history in histories)
    lasting = [history.lasting_seconds for history in histories]
    known = [value for value in lasting if value is not None]
    return History(
        attempts=histories,
        seconds=seconds,
        steps_lost=sum(history.steps_lost or 0 for history in histories),
        goodput=sum(known) / seconds if seconds > 0 and len(known) == len(lasting) else None,
    )


def _history_of_attempt(
    run: Path, attempt: Attempt, latest: int, step_seconds: dict[int, float]
) -> AttemptHistory:
    is_over = bool(attempt.outcome)
    first = max(attempt.checkpoint, 0)
    saved = max(attempt.reached if is_over else latest, first)
    last = attempt.last_step if is_over else attempts.last_step_taken(run, attempt)
    known_last = last if last >= 0 else None  # older versions did not record it
    ended = attempt.ended if is_over else _silent_since(run, attempt)

    lasting = None
    if first in step_seconds and saved in step_seconds:
        lasting = max(0.0, step_seconds[saved] - step_seconds[first])
    return AttemptHistory(
        attempt=attempt.number,
        job=attempt.job,
        began=attempt.began,
        ended=ended,
        outcome=attempt.outcome,
        reason=attempt.reason,
        first_step=first,
        last_step=known_last,
        saved_step=saved,
        steps_lost=max(0, last - saved) if is_over and known_last is not None else None,
        seconds=(time.time() if ended is None else ended) - attempt.began,
        lasting_seconds=lasting,
    )


def _silent_since(run: Path, attempt: Attempt) -> float | None:
    """Time of the last sign of life of an attempt without an outcome; None if it may still run."""
    last_sign = attempts.last_sign_of_life(run, attempt)
    has_begun = last_sign > attempt.began
    limits = attempt.limits
    limit = limits.heartbeat_timeout if has_begun else limits.startup_timeout
    return last_sign if time.time() - last_sign > limit else None


def _seconds_until(run: Path, steps: Iterable[int]) -> dict[int, float]:
    """Time in steps from the beginning of the run to the end of each given step.

    The metrics of a run hold each lasting step once, and a counter of seconds that a resumed run
    continues.
    """
    wanted = {step for step in steps if step > 0}
    seconds = {0: 0.0}
    file = run / METRICS
    if wanted and file.is_file():
        with file.open(errors="replace") as stream:
            # only the lines that are asked for are parsed, as a long run has millions
            lines = (
                line for line in stream if (match := _STEP.match(line)) and int(match[1]) in wanted
            )
            for record in parse_records(lines):
                if "seconds" in record:
                    seconds[record["step"]] = float(record["seconds"])
    return seconds
