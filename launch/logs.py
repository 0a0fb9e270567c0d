"""What `bitlm launch logs` shows: the log of the rank that matters, and why it matters."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bitlm_dist.errors import UserError
from bitlm_dist.formatting import plural
from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import Attempt, Outcome
from bitlm_dist.launch.liveness import silent_seconds
from bitlm_dist.launch.outcomes import first_clause, first_failure, hung_rank, outcome_of
from bitlm_dist.launch.rank_log import LogFollower, last_lines, main_stack_in

NUM_LINES = 20
MAX_TRACEBACK_LINES = 100
MAX_STACKS = 3  # ranks whose stacks are shown after a hang; the others' are in their logs
MAX_STACK_LINES = 40  # of each
FOLLOW_POLL = 0.5  # seconds
MAX_FOLLOW_POLL = 15.0  # while nothing happens, as each look may ask Slurm's controller

_RANK_IN_REASON = re.compile(r"rank (\d+) on ")


class RankLog(NamedTuple):
    """A title that says what happened, and the lines of the log that show it."""

    title: str
    lines: list[str]


def read_log_tail(run: Path, rank: int | None, attempt_number: int | None) -> RankLog:
    """Read the end of a rank's log.

    Args:
        run: the run folder, which was launched.
        rank: global rank; None: the rank that hung or failed first, else rank 0.
        attempt_number: number of the attempt; None: the latest.

    Raises:
        UserError: the attempt or the log does not exist.
    """
    chosen = _choose_attempt(run, attempt_number)
    folder = attempts.attempt_folder(run, chosen.number)
    cause = _rank_of_cause(chosen, folder)
    shown = (cause or 0) if rank is None else rank
    title = f"attempt {chosen.number}, rank {shown}{_explain(chosen, folder, shown)}"

    file = folder / "logs" / f"rank-{shown}.log"
    if not file.is_file():
        start_log = folder / "start.log"
        why = start_log if start_log.is_file() else f"the job's own log in {run}/launch"
        raise UserError(f"{file} is not there: the rank never started, see {why}")

    # the traceback of an error that training has survived is no news
    max_traceback_lines = MAX_TRACEBACK_LINES if shown == cause else 0
    lines = last_lines(file, NUM_LINES, max_traceback_lines) or ["it printed nothing"]
    if rank is None and hung_rank(folder) is not None:
        lines += _stacks_of_others(folder, shown)
    return RankLog(title, lines)


def follow_log(
    run: Path,
    rank: int | None,
    attempt_number: int | None,
    is_active: Callable[[], bool],
) -> Iterator[str]:
    """Yield a title and the lines of a rank's log, and new ones as they come.

    It ends with the attempt if a number is given, else when nothing trains the run any more; an
    attempt that begins in the meantime is followed, too.

    Args:
        run: the run folder, which was launched.
        rank: global rank; None: rank 0.
        attempt_number: number of the attempt; None: the latest.
        is_active: says whether another attempt may follow one that has ended.
    """
    rank = rank or 0
    attempt = _choose_attempt(run, attempt_number)
    while True:
        yield f"attempt {attempt.number}, rank {rank}"
        yield from _follow_attempt(run, attempt, rank, is_active)

        ended = attempts.read_attempt(attempts.attempt_folder(run, attempt.number))
        how = f"{ended.outcome}: {ended.reason}" if ended.outcome else "its launcher was ended"
        yield f"attempt {ended.number}: {how}"
        if attempt_number is not None or not (following := _next_attempt(run, ended, is_active)):
            return
        attempt = following


def _follow_attempt(
    run: Path, attempt: Attempt, rank: int, is_active: Callable[[], bool]
) -> Iterator[str]:
    """Yield the last lines of a log, then new ones until the attempt has ended.

    A launcher that was killed records no end, so after a long silence ``is_active`` decides.
    """
    folder = attempts.attempt_folder(run, attempt.number)
    follower = LogFollower(folder / "logs" / f"rank-{rank}.log")
    yield from follower.new_lines()[-NUM_LINES:]

    pause = FOLLOW_POLL
    while True:
        # asked before the lines are read, so that the last ones are not missed
        latest = attempts.read_attempts(run)[-1]
        is_silent = silent_seconds(run, attempt) > attempt.limits.heartbeat_timeout
        has_ended = (
            latest.number > attempt.number
            or bool(latest.outcome)
            or (is_silent and not is_active())
        )
        yield from follower.new_lines()
        if has_ended:
            return
        pause = min(2 * pause, MAX_FOLLOW_POLL) if is_silent else FOLLOW_POLL
        time.sleep(pause)


def _next_attempt(run: Path, ended: Attempt, is_active: Callable[[], bool]) -> Attempt | None:
    """Wait for the attempt that follows; None if nothing trains the run any more."""
    pause = FOLLOW_POLL
    while True:
        may_follow = is_active()
        for attempt in attempts.read_attempts(run):
            if attempt.number > ended.number:
                return attempt
        if not may_follow:
            return None
        time.sleep(pause)
        pause = min(2 * pause, MAX_FOLLOW_POLL)


def _choose_attempt(run: Path, number: int | None) -> Attempt:
    """Find an attempt by its number; None: the latest.

    Raises:
        UserError: there is no such attempt.
    """
    all_attempts = attempts.read_attempts(run)
    for attempt in reversed(all_attempts):
        if number in (None, attempt.number):
            return attempt

    known = f"it has {plural(len(all_attempts), 'attempt')}" if all_attempts else "none has begun"
    raise UserError(f"{run} has no attempt{'' if number is None else f' {number}'}: {known}")


def _rank_of_cause(attempt: Attempt, folder: Path) -> int | None:
    """The rank that ended an attempt; None if no rank did, or it is not known."""
    if match := _RANK_IN_REASON.match(_reason_of(attempt, folder)):
        return int(match[1])
    failure = first_failure(folder)
    return None if failure is None else int(failure["rank"])


def _reason_of(attempt: Attempt, folder: Path) -> str:
    """Why an attempt ended, or is about to end; empty if all is well."""
    if attempt.outcome:
        return "" if attempt.outcome == Outcome.DONE else attempt.reason
    is_failing = hung_rank(folder) is not None or first_failure(folder) is not None
    return outcome_of(folder, 0)[1] if is_failing else ""


def _explain(attempt: Attempt, folder: Path, shown: int) -> str:
    """Why an attempt ended, as the rest of a title about one of its ranks."""
    failure = first_failure(folder)
    reason = _reason_of(attempt, folder)
    if hung_rank(folder) is not None:
        return f"; the attempt hung: {reason}"

    # the whole message of a rank that could report it
    if failure and failure["rank"] == shown and not failure["lost_peer"]:
        clock = time.strftime("%H:%M:%S", time.localtime(failure["time"]))
        if "exit_code" in failure:
            return f", which at {clock} {failure['message']}"
        # the reason of a refusal is the message, and may name the disk on which to make room
        message = reason if attempt.outcome == Outcome.REFUSED else failure["message"]
        return f", the first to fail, at {clock}: {message}"
    outcome = f"{attempt.outcome}: " if attempt.outcome else ""
    return f"; {outcome}{first_clause(reason)}" if reason else ""


def _stacks_of_others(folder: Path, hung: int) -> Iterator[str]:
    """Where the other ranks were when one hung, as they have printed it."""
    logs = [
        log
        for log in sorted((folder / "logs").glob("rank-*.log"), key=_rank_of_log)
        if _rank_of_log(log) != hung
    ]
    for log in logs[:MAX_STACKS]:
        yield f"--- rank {_rank_of_log(log)} was here; {log} has all its threads:"
        yield from main_stack_in(log)[:MAX_STACK_LINES] or ["it printed no stack"]
    if len(logs) > MAX_STACKS:
        others = plural(len(logs) - MAX_STACKS, "more rank")
        yield f"--- the stacks of {others} are in {folder / 'logs'}"


def _rank_of_log(log: Path) -> int:
    return int(log.stem.partition("-")[2])
