"""The job without Slurm: all ranks on this machine, watched, restarted and stopped as a batch job's are."""

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

from bitlm_dist.launch import agent, attempts
from bitlm_dist.launch.attempts import CANCELLED, LAUNCH, VARIABLE, Verdict
from bitlm_dist.launch.rank import PARENT

from bitlm_dist.errors import UserError
from bitlm_dist.files import try_lock

POLL = 0.2  # seconds
GRACE = 30.0  # seconds that the other ranks have once one has failed: they find out by themselves and say so
LINGER = 600.0  # seconds that the others have once one has ended in peace


def run_here(run: Path, ranks: int, env: Mapping[str, str], echo: Callable[[str], None]) -> Verdict:
    """Train until there is nothing more to do here -> the last verdict.

    Args:
        run: the run folder, with what :func:`bitlm_dist.launch.submit.save` wrote.
        ranks: processes.
        env: variables for them, beside those of this process.
        echo: gets what rank 0 prints, and what the launcher has to say.
    """
    requests: list[str] = []
    (run / LAUNCH / CANCELLED).unlink(missing_ok=True)
    with _alone(run), _signals(requests):
        while True:
            folder = Path(agent.begin(run, [socket.gethostname()])[0])
            code = _Ranks(run, folder, ranks, env, echo).wait(requests)
            action, reason, _, wait = agent.decide(folder, code)
            end = time.monotonic() + float(wait)
            while action == "restart" and not requests and time.monotonic() < end:
                time.sleep(POLL)
            if action != "restart" or requests:
                return Verdict(action, reason)


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """While open, no other launcher of this machine has the run."""
    with (run / LAUNCH / "lock").open("w") as lock:
        if not try_lock(lock):
            raise UserError(f"run.dir = {run} is being trained by another `bitlm launch local`: wait for it or end it")
        yield


@contextmanager
def _signals(requests: list[str]) -> Iterator[None]:
    """While open, signals that ask to end become words in ``requests``."""

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(signal.Signals(number).name)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Ranks:
    """The processes of one attempt."""

    def __init__(self, run: Path, folder: Path, count: int, env: Mapping[str, str], echo: Callable[[str], None]) -> None:
        self._folder, self._tell = folder, echo
        self._log, self._shown = folder / "logs" / "rank-0.log", 0
        command = [sys.executable, "-u", "-m", "bitlm_dist.launch.rank", "train", str(run / LAUNCH / "config.yaml")]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        place = {**os.environ, **env, VARIABLE: str(folder), PARENT: str(os.getpid())}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        with (folder / "start.log").open("ab") as early:
            self._processes = [
                subprocess.Popen(
                    command,
                    env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=early,
                    stderr=early,
                    start_new_session=True,  # Ctrl-C comes to us alone
                )
                for rank in range(count)
            ]

    def wait(self, requests: list[str]) -> int:
        """Until all have ended; one that fails ends the others -> the first code that is not 0."""
        asked, first_at, code = 0, 0.0, 0
        try:
            while True:
                codes = [process.poll() for process in self._processes]
                self._show()
                if len(requests) > asked:
                    asked = len(requests)
                    attempts.ask_to_stop(self._folder, requests[0])
                    self._echo(f"bitlm: {requests[0]}: saving; once more ends it at once" if asked == 1 else "bitlm: ending")
                    if asked > 1:
                        return 1
                bad = [found for found in codes if found]
                if (bad and not code) or (0 in codes and not first_at):
                    code, first_at = bad[0] if bad else 0, time.monotonic()
                if None not in codes or (first_at and time.monotonic() - first_at > (GRACE if code else LINGER)):
                    return code
                time.sleep(POLL)
        finally:
            for process in self._processes:
                process.kill()
                process.wait()
            self._show()

    def _echo(self, line: str) -> None:
        with suppress(OSError):  # nobody reads any more; the run goes on
            self._tell(line)

    def _show(self) -> None:
        with suppress(FileNotFoundError), self._log.open("rb") as stream:
            stream.seek(self._shown)
            new = stream.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._shown += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                self._echo(line)
