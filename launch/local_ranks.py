"""The rank processes of one attempt on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from bitlm_dist.launch import attempts
from bitlm_dist.launch.attempts import ATTEMPT_VARIABLE, LAUNCH
from bitlm_dist.launch.outcomes import failures_of, first_failure, hung_rank
from bitlm_dist.launch.rank import PARENT_VARIABLE
from bitlm_dist.launch.rank_exit import report_exit
from bitlm_dist.launch.rank_log import LogFollower, TracebackFilter

POLL = 0.2  # seconds

# seconds for the other ranks to report why one of them has lost its peers
GRACE = 10.0

# seconds for the other ranks to exit after one has exited in an orderly way
LINGER = 600.0

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


class RankProcesses:
    """Processes of one attempt; constructing it starts them.

    Args:
        folder: the attempt folder.
        num_ranks: number of processes.
        env: environment variables of the ranks, added to those of this process.
        echo: called with each line that rank 0 or the launcher prints, tracebacks excepted.
    """

    def __init__(
        self, folder: Path, num_ranks: int, env: Mapping[str, str], echo: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._echo = echo
        self._log = LogFollower(folder / "logs" / "rank-0.log")
        self._traceback_filter = TracebackFilter()
        self._limits = attempts.read_attempt(folder).limits
        self._num_requests = 0  # stop requests that were passed on
        self._last_poll = time.time()
        self._first_exit_at: float | None = None
        self._failed_at: float | None = None

        config = attempts.run_folder_of(folder) / LAUNCH / "config.yaml"
        environment = {**os.environ, **env, **_rank_environment(folder, num_ranks)}
        with (folder / "start.log").open("ab") as early:
            self._processes = [
                subprocess.Popen(
                    rank_command(config),
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=early,
                    stderr=early,
                    start_new_session=True,  # Ctrl-C must reach the launcher alone
                )
                for rank in range(num_ranks)
            ]

    def wait(self, requests: Sequence[signal.Signals]) -> int:
        """Wait until all ranks have exited; the failure of one ends the others.

        The first entry of ``requests`` asks the ranks to save and exit, a second one kills them.

        Returns:
            The first nonzero exit code, else 0.
        """
        try:
            while True:
                codes = self._poll()
                self._forward_log()

                if len(requests) > self._num_requests:
                    if not self._num_requests:
                        self._request_stop(requests[0])
                    self._num_requests = len(requests)
                    self._echo(
                        f"bitlm: {requests[0].name}: saving; once more ends it at once"
                        if self._num_requests == 1
                        else "bitlm: ending"
                    )
                if self._num_requests > 1 or self._is_over(codes):
                    return next((code for code in codes if code), int(self._num_requests > 1))
                time.sleep(POLL)
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
            self._forward_log()

    def _poll(self) -> list[int | None]:
        """Exit code of every rank, None while it runs; records those that could not report one."""
        still_ran_at = self._last_poll
        self._last_poll = time.time()
        codes = [process.poll() for process in self._processes]

        # ranks that end because another one hangs report nothing, and are not the cause
        if any(codes) and hung_rank(self._folder) is None:
            is_stopping = (self._folder / "stop").is_file()
            for rank, code in enumerate(codes):
                if code and not (is_stopping and -code in STOP_SIGNALS):
                    # An abort is often the reaction of a library to the loss of another rank, so it
                    # counts from when it was seen; other signals come first, as causes.
                    is_abort = code == -signal.SIGABRT
                    with suppress(OSError):  # the disk may be full
                        report_exit(
                            self._folder, rank, code, self._last_poll if is_abort else still_ran_at
                        )
        return codes

    def _request_stop(self, request: signal.Signals) -> None:
        """Ask the ranks to save and exit."""
        try:
            attempts.request_stop(self._folder, request.name)
        except OSError:  # the disk may be full
            for process in self._processes:
                process.send_signal(signal.SIGTERM)

    def _is_over(self, codes: list[int | None]) -> bool:
        """True if all ranks have exited, or those that still run need not be waited for."""
        now = time.monotonic()
        if any(code is not None for code in codes) and self._first_exit_at is None:
            self._first_exit_at = now
        if any(codes) and self._failed_at is None:
            self._failed_at = now

        if None not in codes:
            return True
        if self._failed_at is not None:
            return now - self._failed_at >= self._grace(codes)
        return self._first_exit_at is not None and now - self._first_exit_at > LINGER

    def _grace(self, codes: list[int | None]) -> float:
        """Seconds that the other ranks may take after one has failed: none if the cause is known.

        Collectives have no more use for them, and whatever they report is a consequence.
        """
        hung = hung_rank(self._folder)
        if hung is not None:
            # all but the hung rank print their stacks within two heartbeats
            others = (code for rank, code in enumerate(codes) if rank != hung)
            return GRACE + 2 * self._limits.heartbeat_interval if None in others else 0.0

        failure = first_failure(self._folder)
        return GRACE if failure is None or failure["lost_peer"] else 0.0

    def _forward_log(self) -> None:
        """Echo what rank 0 has logged, without tracebacks; the launcher names the cause itself."""
        for line in self._log.new_lines():
            if self._traceback_filter.passes(line) and not self._is_reported(line):
                self._echo(line)

    def _is_reported(self, line: str) -> bool:
        """True if a line is the failure report of rank 0, which the launcher will print."""
        if not line.startswith(attempts.USER_ERROR_PREFIX):
            return False
        report = failures_of(self._folder).get(0, {})
        return line.removeprefix(attempts.USER_ERROR_PREFIX) == report.get("message")


def rank_command(config: Path) -> list[str]:
    """Command of each rank."""
    return [sys.executable, "-u", "-m", "bitlm_dist.launch.rank", "train", str(config)]


def _rank_environment(folder: Path, num_ranks: int) -> dict[str, str]:
    """Environment variables that all ranks of an attempt share."""
    # let the kernel choose a free port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    return {
        ATTEMPT_VARIABLE: str(folder),
        PARENT_VARIABLE: str(os.getpid()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
    }
