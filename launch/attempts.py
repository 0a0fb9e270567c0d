"""One run is as many attempts as it takes: what each leaves in the run folder, and what is to be done after it.

RUN/launch/attempts/NNNN/ holds of one start of all ranks::

    attempt.json        who started it: job, restart of the job, nodes, time, newest checkpoint then, limits of the watch
    start.log           what was printed before there was a rank: by srun, by nodes where the ranks could not start
    logs/rank-R.log     what each rank printed
    beats/rank-R        where each rank is, see :mod:`bitlm_dist.launch.heartbeat`
    stop                exists once the attempt is to save and end; holds why
    outcome.json        written by rank 0 when it ended as it should: done or stopped, and the step
    failures/rank-R.json  written by a rank that failed
    hung.json           a rank that was found hanging
    nodes/NODE.json     what each node measured before, see :mod:`bitlm_dist.launch.preflight`
    end.json            written by the launcher: what came of it

Files decide, not exit codes: a batch system loses or replaces these. Everything here is the standard library, so that a launcher
can ask before anything heavy is imported.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitlm_dist import errors
from bitlm_dist.errors import UserError
from bitlm_dist.files import to_json, write_atomically

LAUNCH, CANCELLED = "launch", "cancelled"
VARIABLE = "BITLM_ATTEMPT"  # the attempt's folder, for its ranks
DONE, STOPPED, REFUSED, FAILED, HUNG, LOST, BAD_NODES = "done", "stopped", "refused", "failed", "hung", "lost", "bad nodes"
DIVERGED = "diverged"
SIGN = "bitlm: "  # before each line that tells the user what to mend
OWN_FILES = (LAUNCH, "run.lock", "stop")  # beside config.yaml, what a folder may hold in which no step was taken
STOP_REQUEST, BY_USER = "stop file", "the file `stop` in the run folder"
CHECKPOINT = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Limits:
    """When a rank is taken to hang, in seconds.

    Attributes:
        beat: between two signs of life.
        frozen: without any: the process is stopped, swapped out, or stuck inside a call that holds Python's lock.
        stalled: without a step.
        start: until the first step.
    """

    beat: float = 10.0
    frozen: float = 120.0
    stalled: float = 1800.0
    start: float = 3600.0


@dataclass(frozen=True)
class Attempt:
    """attempt.json and end.json.

    Attributes:
        number: from 1.
        job, restart: of the batch system; the job is empty on a single machine.
        nodes: host names.
        began: seconds since 1970.
        checkpoint: step of the newest complete checkpoint when it began, -1: none.
        outcome: DONE, STOPPED … ; empty while it runs.
        reason: in words.
        reached: as ``checkpoint``, at its end.
        ended: seconds since 1970.
        limits: of the watch over its ranks.
        submission: what the user did last to start the run; attempts before that count no more.
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
class Verdict:
    """What the launcher does next.

    Attributes:
        action: ``end`` (all is done, or as the user wishes), ``give up``, ``restart`` (in this allocation), ``requeue`` (give the
            allocation back and wait for another), ``resubmit`` (the same, without the nodes in ``exclude``).
        reason: one line.
        exclude: see above.
        idle: attempts in a row, up to the last, that made no new checkpoint.
    """

    action: str
    reason: str
    exclude: tuple[str, ...] = ()
    idle: int = 0


def check_free(run: Path, used: Iterable[Path]) -> None:
    """Refuse a folder that holds anything but a run, or what is there for a run to begin.

    Args:
        run: the run folder, absolute; may be missing.
        used: absolute paths that the run reads or writes; they may lie in its folder.

    Raises:
        UserError: it holds other files.
    """
    if (run / "config.yaml").is_file() or not run.is_dir():
        return
    for file in run.iterdir():
        linked = file.name == "checkpoints" and file.is_symlink()
        if not (linked or file.name in OWN_FILES or file.name[0] == "." or any(path.is_relative_to(file) for path in used)):
            raise UserError(f"run.dir = {run} holds files but no run: choose an empty or a new folder")


def check_link(run: Path) -> None:
    """Raise a UserError if the checkpoints of a run are behind a link that leads nowhere."""
    link = run / "checkpoints"
    if link.is_symlink() and not link.exists() and (run / "config.yaml").is_file():
        raise UserError(f"{link} leads to {link.resolve()}, which is not there: mount its disk, or mend the link")


def newest_checkpoint(run: Path) -> int:
    """Step of the newest complete checkpoint of a run, -1: none."""
    found = (CHECKPOINT.fullmatch(path.parent.name) for path in (run / "checkpoints").glob("*/manifest.json"))
    return max((int(match[1]) for match in found if match), default=-1)


def folder_of(run: Path, number: int) -> Path:
    """Where an attempt's files are."""
    return run / LAUNCH / "attempts" / f"{number:04d}"


def run_of(folder: Path) -> Path:
    """The run whose attempt is in ``folder``."""
    return folder.parents[2]


def read_attempt(folder: Path) -> Attempt:
    """The attempt of a folder."""
    record = {**_read(folder / "attempt.json"), **_read(folder / "end.json")}
    return Attempt(**{**record, "nodes": tuple(record["nodes"]), "limits": Limits(**record["limits"])})


def read_attempts(run: Path) -> list[Attempt]:
    """All attempts of a run, the first first."""
    return [read_attempt(file.parent) for file in sorted((run / LAUNCH / "attempts").glob("*/attempt.json"))]


def begin(run: Path, job: str, restart: int, nodes: Sequence[str], limits: Limits, submission: str = "") -> Path:
    """Make the next attempt's folder; one before it that has no end is given it."""
    attempts = read_attempts(run)
    if attempts and not attempts[-1].outcome:
        end(run, attempts[-1], LOST, "its launcher was ended: the node failed, or the job was killed")
    number = attempts[-1].number + 1 if attempts else 1
    folder = folder_of(run, number)
    for name in ("logs", "beats", "failures", "nodes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    attempt = asdict(
        Attempt(number, job, restart, tuple(nodes), time.time(), newest_checkpoint(run), limits=limits, submission=submission)
    )
    began = {key: value for key, value in attempt.items() if key not in ("outcome", "reason", "reached", "ended")}
    write_atomically(folder / "attempt.json", to_json(began) + "\n")
    return folder


def end(run: Path, attempt: Attempt, outcome: str, reason: str) -> None:
    """Record what came of an attempt."""
    record = {"outcome": outcome, "reason": reason, "reached": newest_checkpoint(run), "ended": time.time()}
    write_atomically(folder_of(run, attempt.number) / "end.json", to_json(record) + "\n")


def stop_files(environment: Mapping[str, str]) -> list[Path]:
    """The file by which the launcher asks this process to stop; none without a launcher."""
    return [Path(environment[VARIABLE]) / "stop"] if VARIABLE in environment else []


def ask_to_stop(folder: Path, why: str) -> None:
    """Have the ranks of an attempt save and end."""
    write_atomically(folder / "stop", why + "\n")


def report(environment: Mapping[str, str], outcome: str, step: int, by: str) -> None:
    """Rank 0 of a launched run says that it ended as it should, and what stopped it; does nothing otherwise."""
    if VARIABLE in environment:
        record = {"outcome": outcome, "step": step, "by": by}
        write_atomically(Path(environment[VARIABLE]) / "outcome.json", to_json(record) + "\n")


def report_failure(
    environment: Mapping[str, str], rank: int, message: str, lost_peer: bool, refused: bool, diverged: bool = False
) -> None:
    """A rank of a launched run says why it ends; does nothing otherwise.

    Args:
        lost_peer: whether it only missed another one.
        refused: whether the user has to mend something.
        diverged: whether training arrived at numbers that are not finite.
    """
    if VARIABLE not in environment:
        return
    record = {
        "time": time.time(),
        "host": os.uname().nodename,
        "message": message,
        "lost_peer": lost_peer,
        "refused": refused,
        "diverged": diverged,
    }
    with suppress(OSError):  # the error itself is what must be seen
        write_atomically(Path(environment[VARIABLE]) / "failures" / f"rank-{rank}.json", to_json(record) + "\n")


def first_failure(folder: Path) -> dict[str, Any] | None:
    """The failure that came first, with its rank; of ranks that only lost a peer if there is no other."""
    found = []
    for file in (folder / "failures").glob("rank-*.json"):
        record = _read(file)
        if record:
            found.append({**record, "rank": int(file.stem.partition("-")[2])})
    return min(found, key=lambda record: (record["lost_peer"], record["time"], record["rank"]), default=None)


def hung_rank(folder: Path) -> int | None:
    """The rank that was found hanging."""
    found = _read(folder / "hung.json").get("rank")
    return None if found is None else int(found)


def outcome_of(folder: Path, code: int) -> tuple[str, str]:
    """What came of the attempt whose ranks have ended, and why in one line.

    Args:
        code: of the command that ran them; counts only where no file says more.
    """
    outcome, hung, failure = _read(folder / "outcome.json"), _read(folder / "hung.json"), first_failure(folder)
    if outcome and outcome["outcome"] == DONE:
        return DONE, f"step {outcome['step']}"
    if outcome:
        by_user = outcome["by"] == STOP_REQUEST and not (folder / "stop").is_file()
        why = BY_USER if by_user else _why(folder / "stop") or outcome["by"]
        return STOPPED, f"{why}, " + (f"saved at step {outcome['step']}" if outcome["step"] else "before the first step")
    if failure and failure["refused"]:
        return REFUSED, str(failure["message"])
    if failure and failure.get("diverged"):
        return DIVERGED, str(failure["message"])
    if hung:
        return HUNG, f"rank {hung['rank']} on {hung['host']} {hung['what']}"
    if failure:
        return FAILED, f"rank {failure['rank']} on {failure['host']}: {failure['message']}"
    if (folder / "stop").is_file():
        return STOPPED, _why(folder / "stop")
    if code == errors.DIVERGED:
        return DIVERGED, f"a rank ended with exit code {code}: see {folder}/logs"
    return _said_at_start(folder) or (FAILED, f"the ranks ended with exit code {code} and left no word: see {folder}/logs")


def _said_at_start(folder: Path) -> tuple[str, str] | None:
    lines = [line.strip() for line in _why(folder / "start.log").splitlines() if line.strip()]
    ours = [line.removeprefix(SIGN) for line in lines if line.startswith(SIGN)]
    if ours:  # in the words of bitlm: the user has to mend it
        return REFUSED, ours[0]
    return (FAILED, lines[0]) if lines else None


def decide(attempts: Sequence[Attempt], max_restarts: int, cancelled: bool, excluded: Sequence[str] = ()) -> Verdict:
    """What to do after the last of ``attempts``.

    Restarts count as long as no new checkpoint is made; one that is further than any before resets the count, so that a run of
    weeks may fail many times, but none goes round in circles. What must be mended ends a run that has never got anywhere; later it
    is more likely the weather. A run that diverged is not restarted: it is a function of its config, and would diverge again.

    Args:
        max_restarts: in a row without a new checkpoint.
        cancelled: whether the user ended the run.
        excluded: nodes found bad before the last attempt.
    """
    last = attempts[-1]
    if last.outcome == DONE:
        return Verdict("end", f"trained: {last.reason}")
    if cancelled:
        return Verdict("end", "cancelled")
    if last.outcome == STOPPED and last.reason.startswith(BY_USER):
        return Verdict("end", last.reason)
    if last.outcome == DIVERGED:
        return Verdict("give up", last.reason)
    idle, advanced = _idle(attempts)
    if last.outcome == REFUSED and not advanced:
        return Verdict("give up", last.reason)
    if idle > max_restarts:
        return Verdict("give up", f"{idle} attempts in a row made no new checkpoint; the last: {last.reason}")
    if last.outcome == BAD_NODES:
        return Verdict("resubmit", last.reason, tuple(excluded), idle)
    return Verdict("requeue" if last.outcome == STOPPED else "restart", last.reason, idle=idle)


def _idle(attempts: Sequence[Attempt]) -> tuple[int, bool]:
    """Attempts of the last submission, up to the last, that made no new checkpoint, and whether one before them did.

    Attempts that ended because nodes were left out do not count: there is an end of nodes.
    """
    idle, advanced, furthest = 0, False, -1
    for attempt in attempts:
        if attempt.submission != attempts[-1].submission:
            idle, advanced = 0, False
        elif attempt.reached > max(furthest, attempt.checkpoint):
            idle, advanced = 0, True
        elif attempt.outcome != BAD_NODES:
            idle += 1
        furthest = max(furthest, attempt.checkpoint, attempt.reached)
    return idle, advanced


def is_cancelled(run: Path) -> bool:
    """Whether the user ended the run."""
    return (run / LAUNCH / CANCELLED).exists()


def _why(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
