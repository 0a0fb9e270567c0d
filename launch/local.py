"""Supervised job on one machine without Slurm: all ranks are local processes, watched, restarted
and stopped as in a batch job.
"""

import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TypeVar

from bitlm_dist import errors
from bitlm_dist.errors import UserError
from bitlm_dist.files import DISK_FULL, try_lock
from bitlm_dist.formatting import plural
from bitlm_dist.launch import attempts, supervisor
from bitlm_dist.launch.attempts import CANCELLED, CANCELLED_FILE, LAUNCH, Attempt, Outcome
from bitlm_dist.launch.disk_room import with_disk_hint
from bitlm_dist.launch.liveness import LAUNCHER_LOCK, being_trained_error
from bitlm_dist.launch.local_ranks import POLL, STOP_SIGNALS, RankProcesses
from bitlm_dist.launch.next_action import Action
from bitlm_dist.launch.outcomes import first_failure
from bitlm_dist.launch.records import read_text
from bitlm_dist.launch.supervisor import Decision

_T = TypeVar("_T")


def run_local(
    run: Path, num_ranks: int, env: Mapping[str, str], echo: Callable[[str], None]
) -> int:
    """Train until the run ends or is given up, restarting the ranks as needed.

    Args:
        run: the run folder, as prepared by :func:`bitlm_dist.launch.job_files.write_job_files`.
        num_ranks: number of processes.
        env: environment variables of the ranks, added to those of this process.
        echo: called with each line that rank 0 or the launcher prints.

    Returns:
        The exit code of the command, see :mod:`bitlm_dist.errors`.
    """
    return _LocalLauncher(run, num_ranks, env, echo).run()


class _LocalLauncher:
    """The launcher of one run; see :func:`run_local`."""

    def __init__(
        self, run: Path, num_ranks: int, env: Mapping[str, str], echo: Callable[[str], None]
    ) -> None:
        self._run = run
        self._num_ranks = num_ranks
        self._env = env
        self._print_line = echo
        self._requests: list[signal.Signals] = []  # received stop signals

    def run(self) -> int:
        """Run attempts until none follows, and return the exit code."""
        with _launcher_lock(self._run), self._collect_stop_signals():
            (self._run / LAUNCH / CANCELLED_FILE).unlink(missing_ok=True)
            while True:
                folder = self._when_there_is_room(
                    lambda: Path(supervisor.start_attempt(self._run, [socket.gethostname()])[0])
                )
                # `bitlm launch cancel` may have come before the attempt had a folder
                if attempts.is_cancelled(self._run):
                    attempts.request_stop(folder, CANCELLED)
                self._log_start(attempts.read_attempt(folder), folder)
                ranks = self._when_there_is_room(
                    partial(RankProcesses, folder, self._num_ranks, self._env, self._echo)
                )
                code = ranks.wait(self._requests)
                decision = self._when_there_is_room(partial(supervisor.decide, folder, code))

                # a request or `bitlm launch cancel` cuts the wait short
                self._log_end(decision, folder)
                if decision.next.action == Action.RESTART:
                    self._sleep(decision.wait)
                if decision.next.action != Action.RESTART or self._is_stop_requested():
                    return self._exit_code(decision)

    def _is_stop_requested(self) -> bool:
        return bool(self._requests) or attempts.is_cancelled(self._run)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._is_stop_requested():
            time.sleep(POLL)

    def _when_there_is_room(self, write: Callable[[], _T]) -> _T:
        """Call a function that writes to the run folder; wait while its disk is full.

        Raises:
            UserError: the disk is still full after all waits.
        """
        settings = supervisor.load_settings(self._run)
        reason = ""
        for number in range(settings["max_restarts"] + 1):
            try:
                return write()
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                reason = with_disk_hint(self._run, errors.os_error_message(error))

            wait = min(supervisor.MAX_BACKOFF_SECONDS, settings["pause"] * 2**number)
            if number == settings["max_restarts"] or self._is_stop_requested():
                break
            self._log(f"{reason}; trying again in {wait:.0f} s")
            self._sleep(wait)

        raise UserError(f"{reason}; then the same command goes on")

    def _exit_code(self, decision: Decision) -> int:
        outcome = decision.attempt.outcome
        if outcome == Outcome.DONE:
            return 0
        if len(self._requests) > 1:  # ended at once, without a save
            return 128 + self._requests[-1]
        if decision.next.action != Action.GIVE_UP:
            return errors.STOPPED_EXIT_CODE

        codes = {
            Outcome.DIVERGED: errors.DIVERGED_EXIT_CODE,
            Outcome.REFUSED: errors.USER_ERROR_EXIT_CODE,
        }
        return codes.get(Outcome(outcome), 1)

    def _log_start(self, attempt: Attempt, folder: Path) -> None:
        where = f"step {attempt.checkpoint:,}" if attempt.checkpoint > 0 else "the beginning"
        self._log(
            f"attempt {attempt.number}: {plural(self._num_ranks, 'rank')} from {where}; "
            f"logs in {folder / 'logs'}"
        )

    def _log_end(self, decision: Decision, folder: Path) -> None:
        """Say how an attempt ended and what follows, in one line."""
        attempt, following, wait = decision
        if attempt.outcome == Outcome.DONE:
            return  # rank 0 has said so
        if attempt.outcome == Outcome.STOPPED:
            at_once = "ended at once" if len(self._requests) > 1 else "stopped"
            self._log(f"{at_once}: {attempt.reason}; the same command goes on")
            return

        what = f"attempt {attempt.number} {_VERBS[Outcome(attempt.outcome)]}: {attempt.reason}"
        details = f"details: {_log_of_cause(folder)}"
        if following.action == Action.RESTART and self._is_stop_requested():
            self._log(f"{what}; not started again, as requested; {details}")
        elif following.action == Action.RESTART:
            soon = f"starting again in {wait:.0f} s" if wait else "starting again"
            self._log(f"{what}; {soon}; {details}")
        elif following.action == Action.GIVE_UP:
            self._log(f"{what}; {details}")
            if following.reason != attempt.reason:
                self._log(f"given up: {following.reason}")
        else:
            self._log(f"{what}; {following.reason}; {details}")

    @contextmanager
    def _collect_stop_signals(self) -> Iterator[None]:
        """Note stop signals instead of being ended by them."""

        def note(number: int, frame: FrameType | None) -> None:
            self._requests.append(signal.Signals(number))

        has_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        old = {
            number: signal.signal(number, note)
            for number in STOP_SIGNALS
            if not (number == signal.SIGHUP and has_nohup)
        }
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _log(self, text: str) -> None:
        self._echo(f"bitlm: {text}")

    def _echo(self, line: str) -> None:
        with suppress(OSError):  # the terminal may be gone; the run goes on
            self._print_line(line)


_VERBS = {
    Outcome.REFUSED: "was refused",
    Outcome.FAILED: "failed",
    Outcome.HUNG: "hung",
    Outcome.LOST: "was lost",
    Outcome.DIVERGED: "diverged",
}


def _log_of_cause(folder: Path) -> Path:
    """The log of the rank that failed first, or of all, or of ranks that could not start."""
    failure = first_failure(folder)
    logs = folder / "logs"
    if failure and (file := logs / f"rank-{failure['rank']}.log").is_file():
        return file
    start_log = folder / "start.log"
    return start_log if read_text(start_log) else logs


@contextmanager
def _launcher_lock(run: Path) -> Iterator[None]:
    """Hold the run, so that no other launcher on this machine can train it."""
    with (run / LAUNCH / LAUNCHER_LOCK).open("w") as lock:
        if not try_lock(lock):
            raise being_trained_error(run)
        yield
