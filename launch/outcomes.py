"""Outcome of an attempt, read from the files of :mod:`bitlm_dist.launch.attempts`.

Files are read rather than exit codes, which a batch system may lose or replace. Only of a rank that
was killed the exit code is all that is left.
"""

from pathlib import Path
from typing import Any

from bitlm_dist import errors
from bitlm_dist.launch.attempts import (
    LAUNCH,
    STOP_FILE_REASON,
    STOPPED_BY_USER,
    USER_ERROR_PREFIX,
    Outcome,
    run_folder_of,
)
from bitlm_dist.launch.disk_room import full_disk, with_disk_hint
from bitlm_dist.launch.rank_exit import describe_exit, exits_seen_by_srun
from bitlm_dist.launch.records import read_json, read_text

MAX_CLAUSE_LENGTH = 120  # characters of a reason in a table


def first_failure(folder: Path) -> dict[str, Any] | None:
    """Earliest failure report of an attempt, with its rank; None if there is none.

    Ranks that only lost a peer come last, because another rank's failure was the cause. Of those
    that refused to train for the same reason it is the first rank, as it has printed the reason.
    """
    failures = failures_of(folder).values()
    first = min(
        failures,
        key=lambda record: (record["lost_peer"], record["time"], record["rank"]),
        default=None,
    )
    if first is None or not first["refused"]:
        return first
    return min(
        (record for record in failures if record["message"] == first["message"]),
        key=lambda record: record["rank"],
    )


def failures_of(folder: Path) -> dict[int, dict[str, Any]]:
    """The failure reports of an attempt by rank."""
    failures = {}
    for file in (folder / "failures").glob("rank-*.json"):
        rank = int(file.stem.partition("-")[2])
        if record := read_json(file):
            failures[rank] = {**record, "rank": rank}
    return failures


def hung_rank(folder: Path) -> int | None:
    """Rank that was reported as hung; None if there is none."""
    rank = read_json(folder / "hung.json").get("rank")
    return None if rank is None else int(rank)


def first_clause(reason: str) -> str:
    """The part of a reason that says what happened, without remedy and details."""
    if disk := full_disk(reason):
        return f"disk full: make room on {disk}"
    clause = reason.partition("; ")[0].partition(". ")[0]
    if len(clause) <= MAX_CLAUSE_LENGTH:
        return clause
    return f"{clause[: MAX_CLAUSE_LENGTH - 1].strip()}…"


def outcome_of(folder: Path, exit_code: int) -> tuple[str, str]:
    """Determine the outcome of an attempt whose ranks have exited.

    Args:
        folder: the attempt folder.
        exit_code: of the command that ran the ranks; used only if no file tells the outcome.

    Returns:
        The outcome, and the reason in one line.
    """
    if orderly := _orderly_outcome(folder):
        return orderly

    outcome, reason = _failed_outcome(folder, exit_code)
    if outcome in (Outcome.FAILED, Outcome.REFUSED, Outcome.HUNG):
        reason = with_disk_hint(run_folder_of(folder), reason)
    return outcome, reason


def _orderly_outcome(folder: Path) -> tuple[str, str] | None:
    """Outcome and reason that rank 0 has reported; None if it has not."""
    outcome = read_json(folder / "outcome.json")
    if outcome and outcome["outcome"] == Outcome.DONE:
        return Outcome.DONE, f"step {outcome['step']}"
    if not outcome:
        return None

    # without the launcher's stop file, it was the user's
    is_user_stop = outcome["by"] == STOP_FILE_REASON and not (folder / "stop").is_file()
    why = STOPPED_BY_USER if is_user_stop else read_text(folder / "stop") or outcome["by"]
    where = f"saved at step {outcome['step']}" if outcome["step"] else "before the first step"
    return Outcome.STOPPED, f"{why}, {where}"


def _failed_outcome(folder: Path, exit_code: int) -> tuple[str, str]:
    """Outcome and reason without a report of rank 0."""
    hung = read_json(folder / "hung.json")
    failure = first_failure(folder)

    # Known causes come first. A hang precedes other failures, as ranks that abort because of it
    # report failures, too.
    if failure and failure["refused"]:
        return Outcome.REFUSED, str(failure["message"])
    if failure and failure.get("diverged"):
        return Outcome.DIVERGED, str(failure["message"])
    if hung:
        return Outcome.HUNG, f"rank {hung['rank']} on {hung['host']} {hung['what']}"
    if failure and not failure["lost_peer"] and "exit_code" not in failure:
        return Outcome.FAILED, failure_words(failure)

    # A rank that was killed reports nothing, but its parent knows. Ranks that lost it come after.
    if failure and not failure["lost_peer"]:
        return _outcome_from_start_log(folder, only_user_errors=True) or (
            Outcome.FAILED,
            failure_words(failure),
        )
    is_stopping = (folder / "stop").is_file()
    if not is_stopping and (refused := _outcome_from_start_log(folder, only_user_errors=True)):
        return refused  # srun killed the others because of it
    seen = None if is_stopping else _exit_seen_by_srun(folder, has_lost_peer=failure is not None)
    if seen:
        return Outcome.FAILED, seen
    if failure:
        return Outcome.FAILED, failure_words(failure)

    # no rank has reported anything
    if is_stopping:
        return Outcome.STOPPED, read_text(folder / "stop")
    if exit_code == errors.DIVERGED_EXIT_CODE:
        return Outcome.DIVERGED, f"a rank ended with exit code {exit_code}: see {folder}/logs"
    what = (
        f"a rank {describe_exit(exit_code)}"
        if exit_code < 0
        else f"the ranks ended with exit code {exit_code} and reported nothing"
    )
    return _outcome_from_start_log(folder) or (Outcome.FAILED, f"{what}: see {folder}/logs")


def failure_words(failure: dict[str, Any]) -> str:
    """A failure report in words: rank, host and message."""
    separator = " " if "exit_code" in failure else ": "
    return f"rank {failure['rank']} on {failure['host']}{separator}{failure['message']}"


def _exit_seen_by_srun(folder: Path, has_lost_peer: bool) -> str | None:
    """Words for the first task of srun that ended without a report; None if srun names none.

    An exit code alone says less than the first line of start.log, unless that line is srun's.
    """
    failures = failures_of(folder)
    hosts = {str(record["host"]).partition(".")[0] for record in failures.values()}
    settings = read_json(run_folder_of(folder) / LAUNCH / "settings.json")
    is_rank = settings.get("launcher", "srun") == "srun"  # else a task is the launcher of a node
    start_log = read_text(folder / "start.log")
    says_more = not (has_lost_peer or start_log.startswith("srun: error: "))

    for seen in exits_seen_by_srun(folder):
        has_reported = seen.task in failures if is_rank else seen.node in hosts
        if not has_reported and (seen.is_signal or not says_more):
            who = f"rank {seen.task}" if is_rank else "the launcher of the ranks"
            return f"{who} on {seen.node} {seen.words}"
    return None


def _outcome_from_start_log(folder: Path, only_user_errors: bool = False) -> tuple[str, str] | None:
    """Outcome and reason according to start.log; None if it says nothing of the kind."""
    lines = [line.strip() for line in read_text(folder / "start.log").splitlines() if line.strip()]
    user_errors = [
        line.removeprefix(USER_ERROR_PREFIX) for line in lines if line.startswith(USER_ERROR_PREFIX)
    ]

    # a line with bitlm's own prefix tells the user what to fix
    if user_errors:
        return Outcome.REFUSED, user_errors[0]
    return (Outcome.FAILED, lines[0]) if lines and not only_user_errors else None
