"""Attempts of a run: the files that each one leaves in the run folder, and the action that follows.

An attempt is one launch of all ranks. RUN/launch/attempts/NNNN/ holds::

    attempt.json        written at the start: job, restart count of the job, nodes, time, latest
                        checkpoint, heartbeat timeouts
    start.log           output from before the ranks started: of srun, and of nodes on which they
                        could not start
    logs/rank-R.log     output of each rank
    beats/rank-R        heartbeat of each rank, see :mod:`bitlm_dist.launch.heartbeat`
    stop                created to make the attempt save and exit; holds the reason
    outcome.json        written by rank 0 at an orderly exit: done or stopped, and the step
    failures/rank-R.json  written by a rank that failed
    hung.json           the rank that was reported as hung
    nodes/NODE.json     preflight measurements of each node, see
                        :mod:`bitlm_dist.launch.preflight`
    end.json            written by the launcher: the outcome of the attempt

An outcome is read from these files rather than from exit codes, which a batch system may lose or
replace. This module imports nothing heavy (no torch), so that launchers start fast.
"""

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from bitlm_dist import errors
from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.errors import UserError
from bitlm_dist.files import write_atomically
from bitlm_dist.strict_json import to_json

LAUNCH = "launch"
CANCELLED_FILE = "cancelled"
ATTEMPT_VARIABLE = "BITLM_ATTEMPT"  # environment variable with the attempt's folder, for the ranks

USER_ERROR_PREFIX = "bitlm: "  # starts each line that tells the user what to fix

# what a folder may hold, besides config.yaml, before the first step of a run
FILES_BEFORE_FIRST_STEP = (LAUNCH, "run.lock", "stop")
STOP_FILE_REASON = "stop file"
STOPPED_BY_USER = "the file `stop` in the run folder"
_RENAMED_LIMITS = {  # names before 0.2.0, and what they are called today
    "beat": "heartbeat_interval",
    "frozen": "heartbeat_timeout",
    "stalled": "step_timeout",
    "start": "startup_timeout",
}


class Outcome(StrEnum):
    """How an attempt ended."""

    DONE = "done"  # all steps were taken
    STOPPED = "stopped"  # saved and exited on request
    REFUSED = "refused"  # a rank raised UserError: the user has to fix something
    FAILED = "failed"  # a rank failed in any other way
    HUNG = "hung"  # a rank made no progress until a timeout
    LOST = "lost"  # the launcher was killed before it could record an outcome
    BAD_NODES = "bad nodes"  # the preflight check excluded nodes
    DIVERGED = "diverged"  # loss, gradients or weights became non-finite


class Action(StrEnum):
    """What the launcher does after an attempt."""

    END = "end"  # trained, or ended by the user
    GIVE_UP = "give up"
    RESTART = "restart"  # in this allocation
    REQUEUE = "requeue"  # release the allocation and wait for another one
    RESUBMIT = "resubmit"  # the same, without the excluded nodes


@dataclass(frozen=True)
class Limits:
    """Heartbeat interval, and the timeouts after which a rank counts as hung; all in seconds.

    Attributes:
        heartbeat_interval: between two heartbeats.
        heartbeat_timeout: without a heartbeat. The process is then stopped, swapped out, or stuck
            in a call that holds the GIL.
        step_timeout: without a step.
        startup_timeout: until the first step.
    """

    heartbeat_interval: float = 10.0
    heartbeat_timeout: float = 120.0
    step_timeout: float = 1800.0
    startup_timeout: float = 3600.0

    @classmethod
    def from_record(cls, record: Mapping[str, float]) -> "Limits":
        """Read the limits in a settings.json or attempt.json, also of older versions."""
        return cls(**{_RENAMED_LIMITS.get(name, name): value for name, value in record.items()})


@dataclass(frozen=True)
class Attempt:
    """Contents of attempt.json and end.json.

    Attributes:
        number: counted from 1.
        job: job id of the batch system; empty on a single machine.
        restart: restart count of that job.
        nodes: host names.
        began: start time, seconds since 1970.
        checkpoint: step of the latest complete checkpoint at the start; -1 if there was none.
        outcome: an :class:`Outcome`; empty while the attempt runs.
        reason: the outcome in words.
        reached: step of the latest complete checkpoint at the end; -1 if there was none.
        ended: end time, seconds since 1970.
        limits: heartbeat timeouts of its ranks.
        submission: id of the user's submit or resume command that led to this attempt. Attempts of
            earlier submissions do not count against ``max_restarts``.
    """

    number: int
    job: str
    restart: int
    nodes: tuple[str, ...]
    began: float
    checkpoint: int
    outcome: str = ""
    reason: str = ""
    reached: int = -1
    ended: float = 0.0
    limits: Limits = field(default_factory=Limits)
    submission: str = ""


@dataclass(frozen=True)
class NextAction:
    """The launcher's action after an attempt.

    Attributes:
        action: see :class:`Action`.
        reason: one line.
        exclude: nodes that the next job must not use.
        num_without_progress: number of attempts since the last one that made a new checkpoint.
    """

    action: Action
    reason: str
    exclude: tuple[str, ...] = ()
    num_without_progress: int = 0


def check_run_folder(run: Path, used: Iterable[Path]) -> None:
    """Refuse a folder that is not empty and was not written by a run.

    Args:
        run: the run folder, absolute; may be missing.
        used: absolute paths that the config names; they may be inside the run folder.

    Raises:
        UserError: the folder holds unrelated files.
    """
    if (run / "config.yaml").is_file() or not run.is_dir():
        return

    for file in run.iterdir():
        # the user may have linked the checkpoints to another disk before the first start
        linked = file.name == "checkpoints" and file.is_symlink()
        if not (
            linked
            or file.name in FILES_BEFORE_FIRST_STEP
            or file.name[0] == "."
            or any(path.is_relative_to(file) for path in used)
        ):
            raise UserError(
                f"run.dir = {run} holds files but no run: choose an empty or a new folder"
            )


def check_checkpoint_link(run: Path) -> None:
    """Refuse a run whose checkpoint folder is a dangling link.

    Raises:
        UserError: the target of the link does not exist.
    """
    link = run / "checkpoints"
    if link.is_symlink() and not link.exists() and (run / "config.yaml").is_file():
        raise UserError(
            f"{link} leads to {link.resolve()}, which is not there: "
            "mount its disk, or mend the link"
        )


def latest_checkpoint_step(run: Path) -> int:
    """Step of the latest complete checkpoint of a run; -1 if there is none."""
    return max(complete_steps(run / "checkpoints"), default=-1)


def attempt_folder(run: Path, number: int) -> Path:
    """Folder of an attempt's files."""
    return run / LAUNCH / "attempts" / f"{number:04d}"


def run_folder_of(folder: Path) -> Path:
    """Run folder that contains the attempt folder ``folder``."""
    return folder.parents[2]


def read_attempt(folder: Path) -> Attempt:
    """Read the attempt whose files are in ``folder``."""
    record = {**_read_json(folder / "attempt.json"), **_read_json(folder / "end.json")}

    return Attempt(
        **{
            **record,
            "nodes": tuple(record["nodes"]),
            "limits": Limits.from_record(record["limits"]),
        }
    )


def read_attempts(run: Path) -> list[Attempt]:
    """Read all attempts of a run, oldest first."""
    return [
        read_attempt(file.parent)
        for file in sorted((run / LAUNCH / "attempts").glob("*/attempt.json"))
    ]


def create_attempt(
    run: Path, job: str, restart: int, nodes: Sequence[str], limits: Limits, submission: str = ""
) -> Path:
    """Create the folder of the next attempt; a previous one without an outcome is marked LOST.

    Returns:
        The attempt folder.
    """
    attempts = read_attempts(run)
    if attempts and not attempts[-1].outcome:
        # its launcher had no time to record an end
        record_end(
            run,
            attempts[-1],
            Outcome.LOST,
            "its launcher was ended: the node failed, or the job was killed",
        )

    number = attempts[-1].number + 1 if attempts else 1
    folder = attempt_folder(run, number)
    for name in ("logs", "beats", "failures", "nodes"):
        (folder / name).mkdir(parents=True, exist_ok=True)

    attempt = asdict(
        Attempt(
            number,
            job,
            restart,
            tuple(nodes),
            time.time(),
            latest_checkpoint_step(run),
            limits=limits,
            submission=submission,
        )
    )

    # the other fields go into end.json
    record = {
        key: value
        for key, value in attempt.items()
        if key not in ("outcome", "reason", "reached", "ended")
    }
    write_atomically(folder / "attempt.json", to_json(record) + "\n")
    return folder


def record_end(run: Path, attempt: Attempt, outcome: str, reason: str) -> None:
    """Write end.json of an attempt."""
    record = {
        "outcome": outcome,
        "reason": reason,
        "reached": latest_checkpoint_step(run),
        "ended": time.time(),
    }
    write_atomically(attempt_folder(run, attempt.number) / "end.json", to_json(record) + "\n")


def stop_files(environment: Mapping[str, str]) -> list[Path]:
    """Files by which the launcher asks this process to stop; empty without a launcher."""
    return [Path(environment[ATTEMPT_VARIABLE]) / "stop"] if ATTEMPT_VARIABLE in environment else []


def request_stop(folder: Path, reason: str) -> None:
    """Ask the ranks of an attempt to save and exit."""
    write_atomically(folder / "stop", reason + "\n")


def report_outcome(
    environment: Mapping[str, str], outcome: str, step: int, stopped_by: str
) -> None:
    """Record an orderly exit and its cause. Called on rank 0; a no-op without a launcher."""
    if ATTEMPT_VARIABLE in environment:
        record = {"outcome": outcome, "step": step, "by": stopped_by}
        write_atomically(
            Path(environment[ATTEMPT_VARIABLE]) / "outcome.json", to_json(record) + "\n"
        )


def report_failure(
    environment: Mapping[str, str],
    rank: int,
    message: str,
    lost_peer: bool,
    refused: bool,
    diverged: bool = False,
) -> None:
    """Record why this rank failed. A no-op without a launcher.

    Args:
        environment: environment variables of this process.
        rank: global rank.
        message: the error in one line.
        lost_peer: the rank only lost its connection to another rank.
        refused: the user has to fix something.
        diverged: loss, gradients or weights became non-finite.
    """
    if ATTEMPT_VARIABLE not in environment:
        return

    record = {
        "time": time.time(),
        "host": os.uname().nodename,
        "message": message,
        "lost_peer": lost_peer,
        "refused": refused,
        "diverged": diverged,
    }

    with suppress(OSError):  # a failed report must not hide the error itself
        write_atomically(
            Path(environment[ATTEMPT_VARIABLE]) / "failures" / f"rank-{rank}.json",
            to_json(record) + "\n",
        )


def first_failure(folder: Path) -> dict[str, Any] | None:
    """Earliest failure report of an attempt, with its rank; None if there is none.

    Ranks that only lost a peer come last, because another rank's failure was the cause.
    """
    failures = []
    for file in (folder / "failures").glob("rank-*.json"):
        record = _read_json(file)
        if record:
            failures.append({**record, "rank": int(file.stem.partition("-")[2])})

    return min(
        failures,
        key=lambda record: (record["lost_peer"], record["time"], record["rank"]),
        default=None,
    )


def hung_rank(folder: Path) -> int | None:
    """Rank that was reported as hung; None if there is none."""
    rank = _read_json(folder / "hung.json").get("rank")
    return None if rank is None else int(rank)


def outcome_of(folder: Path, exit_code: int) -> tuple[str, str]:
    """Determine the outcome of an attempt whose ranks have exited.

    Args:
        folder: the attempt folder.
        exit_code: of the command that ran the ranks; used only if no file tells the outcome.

    Returns:
        The outcome, and the reason in one line.
    """
    outcome = _read_json(folder / "outcome.json")
    hung = _read_json(folder / "hung.json")
    failure = first_failure(folder)

    # rank 0 reported an orderly exit
    if outcome and outcome["outcome"] == Outcome.DONE:
        return Outcome.DONE, f"step {outcome['step']}"
    if outcome:
        # without the launcher's stop file, it was the user's
        is_user_stop = outcome["by"] == STOP_FILE_REASON and not (folder / "stop").is_file()
        why = STOPPED_BY_USER if is_user_stop else _read_text(folder / "stop") or outcome["by"]
        return Outcome.STOPPED, f"{why}, " + (
            f"saved at step {outcome['step']}" if outcome["step"] else "before the first step"
        )

    # Known causes come first. A hang precedes other failures, as ranks that abort because of it
    # report failures, too.
    if failure and failure["refused"]:
        return Outcome.REFUSED, str(failure["message"])
    if failure and failure.get("diverged"):
        return Outcome.DIVERGED, str(failure["message"])
    if hung:
        return Outcome.HUNG, f"rank {hung['rank']} on {hung['host']} {hung['what']}"
    if failure:
        return Outcome.FAILED, f"rank {failure['rank']} on {failure['host']}: {failure['message']}"

    # no rank has reported anything
    if (folder / "stop").is_file():
        return Outcome.STOPPED, _read_text(folder / "stop")
    if exit_code == errors.DIVERGED_EXIT_CODE:
        return Outcome.DIVERGED, f"a rank ended with exit code {exit_code}: see {folder}/logs"
    return _outcome_from_start_log(folder) or (
        Outcome.FAILED,
        f"the ranks ended with exit code {exit_code} and reported nothing: see {folder}/logs",
    )


def _outcome_from_start_log(folder: Path) -> tuple[str, str] | None:
    """Outcome and reason according to start.log; None if it is empty."""
    lines = [line.strip() for line in _read_text(folder / "start.log").splitlines() if line.strip()]
    user_errors = [
        line.removeprefix(USER_ERROR_PREFIX) for line in lines if line.startswith(USER_ERROR_PREFIX)
    ]

    # a line with bitlm's own prefix tells the user what to fix
    if user_errors:
        return Outcome.REFUSED, user_errors[0]
    return (Outcome.FAILED, lines[0]) if lines else None


def next_action(
    attempts: Sequence[Attempt], max_restarts: int, cancelled: bool, excluded: Sequence[str] = ()
) -> NextAction:
    """Decide what follows the last of ``attempts``.

    Only consecutive attempts without a new checkpoint count towards ``max_restarts``; a checkpoint
    beyond all earlier ones resets the count. So a run of weeks may fail many times, but a crash
    loop ends. A user error is fatal only before the submission's first progress; after that it is
    probably transient. A run that diverged is not restarted: it is a function of its config, and
    would diverge again.

    Args:
        attempts: oldest first; at least one.
        max_restarts: allowed consecutive restarts without a new checkpoint.
        cancelled: the user cancelled the run.
        excluded: nodes found bad before the last attempt.
    """
    last = attempts[-1]

    # these end the run, whatever happened before
    if last.outcome == Outcome.DONE:
        return NextAction(Action.END, f"trained: {last.reason}")
    if cancelled:
        return NextAction(Action.END, "cancelled")
    if last.outcome == Outcome.STOPPED and last.reason.startswith(STOPPED_BY_USER):
        return NextAction(Action.END, last.reason)
    if last.outcome == Outcome.DIVERGED:
        return NextAction(Action.GIVE_UP, last.reason)

    num_without_progress, has_progress = _count_without_progress(attempts)
    if last.outcome == Outcome.REFUSED and not has_progress:
        return NextAction(Action.GIVE_UP, last.reason)
    if num_without_progress > max_restarts:
        return NextAction(
            Action.GIVE_UP,
            f"{num_without_progress} attempts in a row made no new checkpoint; "
            f"the last: {last.reason}",
        )

    # only a new job can get other nodes
    if last.outcome == Outcome.BAD_NODES:
        return NextAction(Action.RESUBMIT, last.reason, tuple(excluded), num_without_progress)
    return NextAction(
        Action.REQUEUE if last.outcome == Outcome.STOPPED else Action.RESTART,
        last.reason,
        num_without_progress=num_without_progress,
    )


def _count_without_progress(attempts: Sequence[Attempt]) -> tuple[int, bool]:
    """Count the trailing attempts of the last submission that made no new checkpoint.

    Attempts that ended because nodes were excluded do not count: the number of nodes is finite, so
    this cannot repeat forever.

    Returns:
        The count, and whether any attempt of the last submission made progress.
    """
    num_without_progress = 0
    has_progress = False
    furthest = -1

    for attempt in attempts:
        if attempt.submission != attempts[-1].submission:
            num_without_progress = 0
            has_progress = False
        elif attempt.reached > max(furthest, attempt.checkpoint):
            num_without_progress = 0
            has_progress = True
        elif attempt.outcome != Outcome.BAD_NODES:
            num_without_progress += 1

        # includes earlier submissions: repeating their steps is no progress
        furthest = max(furthest, attempt.checkpoint, attempt.reached)

    return num_without_progress, has_progress


def is_cancelled(run: Path) -> bool:
    """True if the user cancelled the run."""
    return (run / LAUNCH / CANCELLED_FILE).exists()


def _read_text(file: Path) -> str:
    """Contents of a file; empty if it cannot be read."""
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or holds none."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}

    return record if isinstance(record, dict) else {}
