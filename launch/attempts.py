"""Attempts of a run: the files that each one leaves in the run folder.

An attempt is one launch of all ranks. RUN/launch/attempts/NNNN/ holds::

    attempt.json        written at the start: job, restart count of the job, nodes, time, latest
                        checkpoint, heartbeat timeouts
    start.log           output from before the ranks started: of srun, and of nodes on which they
                        could not start
    logs/rank-R.log     output of each rank
    beats/rank-R        heartbeat of each rank, see :mod:`bitlm_dist.launch.heartbeat`
    stop                created to make the attempt save and exit; holds the reason
    outcome.json        written by rank 0 at an orderly exit: done or stopped, and the step
    failures/rank-R.json  written by a rank that failed; by the launcher if the rank could not,
                        as it was killed
    hung.json           the rank that was reported as hung
    nodes/NODE.json     preflight measurements of each node, see
                        :mod:`bitlm_dist.launch.preflight`
    end.json            written by the launcher: the outcome of the attempt

:mod:`bitlm_dist.launch.outcomes` reads the outcome from these files, and
:mod:`bitlm_dist.launch.next_action` decides what follows. These modules import nothing heavy (no
torch), so that launchers start fast.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.errors import UserError
from bitlm_dist.files import write_atomically
from bitlm_dist.launch.records import METRICS, last_records, read_json, read_text
from bitlm_dist.strict_json import to_json

LAUNCH = "launch"
CANCELLED_FILE = "cancelled"
CANCELLED = "cancelled"  # the reason in the file `stop`
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
        last_step: last step that was taken, saved or not; -1 if unknown.
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
    last_step: int = -1


def check_run_folder(run: Path, used: Iterable[Path]) -> None:
    """Refuse a folder that is not empty and was not written by a run.

    Args:
        run: the run folder, absolute; may be missing.
        used: absolute paths that the config names; they may be inside the run folder.

    Raises:
        UserError: the folder holds unrelated files.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"run.dir = {run} is a file: choose a folder")
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
    record = {**read_json(folder / "attempt.json"), **read_json(folder / "end.json")}

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
            last_sign_of_life(run, attempts[-1]),  # the next attempt may begin days later
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
        if key not in ("outcome", "reason", "reached", "ended", "last_step")
    }
    write_atomically(folder / "attempt.json", to_json(record) + "\n")
    return folder


def last_sign_of_life(run: Path, attempt: Attempt) -> float:
    """Time of the latest heartbeat or output of an attempt's ranks, or of its start."""
    folder = attempt_folder(run, attempt.number)
    times = [attempt.began]
    for file in (*(folder / "beats").glob("rank-*"), *(folder / "logs").glob("rank-*")):
        with suppress(FileNotFoundError):  # a rank removes its heartbeat when it exits
            times.append(file.stat().st_mtime)
    return max(times)


def record_end(
    run: Path, attempt: Attempt, outcome: str, reason: str, ended: float | None = None
) -> None:
    """Write end.json of an attempt.

    Args:
        run: the run folder.
        attempt: the attempt.
        outcome: an :class:`Outcome`.
        reason: the outcome in words.
        ended: when it ended, seconds since 1970; None: now.
    """
    record = {
        "outcome": outcome,
        "reason": reason,
        "reached": latest_checkpoint_step(run),
        "ended": time.time() if ended is None else ended,
        "last_step": last_step_taken(run, attempt),
    }
    write_atomically(attempt_folder(run, attempt.number) / "end.json", to_json(record) + "\n")


def last_step_taken(run: Path, attempt: Attempt) -> int:
    """The last step that the latest attempt of a run has taken so far, saved or not."""
    file = run / METRICS
    records = last_records(file, 1)
    # Before its first step, the file still holds what the attempt before it has lost.
    has_stepped = bool(records) and file.stat().st_mtime >= attempt.began
    return int(records[-1]["step"]) if has_stepped else max(attempt.checkpoint, 0)


def stop_files(environment: Mapping[str, str]) -> list[Path]:
    """Files by which the launcher asks this process to stop; empty without a launcher."""
    return [Path(environment[ATTEMPT_VARIABLE]) / "stop"] if ATTEMPT_VARIABLE in environment else []


def request_stop(folder: Path, reason: str) -> None:
    """Ask the ranks of an attempt to save and exit."""
    write_atomically(folder / "stop", reason + "\n")


def requested_stop(environment: Mapping[str, str]) -> str:
    """Why the launcher has asked this process to stop; empty if it has not."""
    return next((reason for file in stop_files(environment) if (reason := read_text(file))), "")


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


def is_cancelled(run: Path) -> bool:
    """True if the user cancelled the run."""
    return (run / LAUNCH / CANCELLED_FILE).exists()
