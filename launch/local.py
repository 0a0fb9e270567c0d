"""Supervised job on one machine without Slurm: all ranks are local processes, watched, restarted
and stopped as in a batch job.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from bitlm_dist.errors import UserError
from bitlm_dist.files import try_lock
from bitlm_dist.launch import attempts, supervisor
from bitlm_dist.launch.attempts import ATTEMPT_VARIABLE, CANCELLED_FILE, LAUNCH, Action, NextAction
from bitlm_dist.launch.rank import PARENT_VARIABLE

POLL = 0.2  # seconds

# seconds for the other ranks to notice a failed one and report it
GRACE = 30.0

# seconds for the other ranks to exit after one has exited in an orderly way
LINGER = 600.0


def run_local(
    run: Path, num_ranks: int, env: Mapping[str, str], echo: Callable[[str], None]
) -> NextAction:
    """Train until the run ends or is given up, restarting the ranks as needed.

    Args:
        run: the run folder, as prepared by :func:`bitlm_dist.launch.submit.write_job_files`.
        num_ranks: number of processes.
        env: environment variables of the ranks, added to those of this process.
        echo: called with each line that rank 0 or the launcher prints.

    Returns:
        The action that followed from the last attempt.
    """
    requests: list[str] = []
    (run / LAUNCH / CANCELLED_FILE).unlink(missing_ok=True)

    with _launcher_lock(run), _collect_stop_signals(requests):
        while True:
            folder = Path(supervisor.start_attempt(run, [socket.gethostname()])[0])
            code = _RankProcesses(run, folder, num_ranks, env, echo).wait(requests)
            action, reason, _, wait = supervisor.finish_attempt(folder, code)

            # a signal cuts the backoff short
            end = time.monotonic() + float(wait)
            while action == Action.RESTART and not requests and time.monotonic() < end:
                time.sleep(POLL)

            if action != Action.RESTART or requests:
                return NextAction(Action(action), reason)


@contextmanager
def _launcher_lock(run: Path) -> Iterator[None]:
    """Hold the run, so that no other launcher on this machine can train it."""
    with (run / LAUNCH / "lock").open("w") as lock:
        if not try_lock(lock):
            raise UserError(
                f"run.dir = {run} is being trained by another `bitlm launch local`: "
                "wait for it or end it"
            )
        yield


@contextmanager
def _collect_stop_signals(requests: list[str]) -> Iterator[None]:
    """Append the names of received stop signals to ``requests`` instead of being ended by them."""

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(signal.Signals(number).name)

    old = {
        number: signal.signal(number, note)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _RankProcesses:
    """Processes of one attempt; constructing it starts them."""

    def __init__(
        self,
        run: Path,
        folder: Path,
        num_ranks: int,
        env: Mapping[str, str],
        echo: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._print_line = echo
        self._log = folder / "logs" / "rank-0.log"
        self._num_bytes_shown = 0
        command = [
            sys.executable,
            "-u",
            "-m",
            "bitlm_dist.launch.rank",
            "train",
            str(run / LAUNCH / "config.yaml"),
        ]

        # let the kernel choose a free port
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        environment = {
            **os.environ,
            **env,
            ATTEMPT_VARIABLE: str(folder),
            PARENT_VARIABLE: str(os.getpid()),
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}

        with (folder / "start.log").open("ab") as early:
            self._processes = [
                subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=early,
                    stderr=early,
                    start_new_session=True,  # Ctrl-C must reach the launcher alone
                )
                for rank in range(num_ranks)
            ]

    def wait(self, requests: list[str]) -> int:
        """Wait until all ranks have exited; the failure of one ends the others.

        The first entry of ``requests`` asks the ranks to save and exit, a second one kills them.

        Returns:
            The first nonzero exit code, else 0.
        """
        num_handled = 0
        first_exit_at = 0.0
        code = 0

        try:
            while True:
                codes = [process.poll() for process in self._processes]
                self._forward_log()

                if len(requests) > num_handled:
                    num_handled = len(requests)
                    attempts.request_stop(self._folder, requests[0])
                    self._echo(
                        f"bitlm: {requests[0]}: saving; once more ends it at once"
                        if num_handled == 1
                        else "bitlm: ending"
                    )
                    if num_handled > 1:
                        return 1

                # the clock of GRACE or LINGER starts at the first exit, and again at a failure
                failed = [exit_code for exit_code in codes if exit_code]
                if (failed and not code) or (0 in codes and not first_exit_at):
                    code = failed[0] if failed else 0
                    first_exit_at = time.monotonic()

                if None not in codes or (
                    first_exit_at and time.monotonic() - first_exit_at > (GRACE if code else LINGER)
                ):
                    return code
                time.sleep(POLL)
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
            self._forward_log()

    def _echo(self, line: str) -> None:
        with suppress(OSError):  # the terminal may be gone; the run goes on
            self._print_line(line)

    def _forward_log(self) -> None:
        """Echo the complete lines that rank 0 has logged since the last call."""
        with suppress(FileNotFoundError), self._log.open("rb") as stream:
            stream.seek(self._num_bytes_shown)
            new = stream.read()
            complete_lines = new[: new.rfind(b"\n") + 1]
            self._num_bytes_shown += len(complete_lines)

            for line in complete_lines.decode(errors="replace").splitlines():
                self._echo(line)
