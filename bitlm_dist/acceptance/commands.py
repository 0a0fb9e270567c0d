"""Commands of the acceptance run. Each has its own process group, which is killed whole at the time
limit, so that a hang or a CUDA error ends a single check and nothing else.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from bitlm_dist.processes import die_with_parent

POLL_SECONDS = 0.02
MAX_OUTPUT = 4000  # characters of a failed command that the report keeps
MAX_REASON = 300  # characters


class CheckSkippedError(Exception):
    """A check cannot be made here; the message says why."""


class CheckFailedError(Exception):
    """A check failed.

    Attributes:
        output: the end of what the command printed.
        code: exit code of the command; None if it was killed at its limit, or there was none.
    """

    def __init__(self, reason: str, output: str = "", code: int | None = None) -> None:
        super().__init__(reason)
        self.output = output[-MAX_OUTPUT:]
        self.code = code


class Commands:
    """Runs the commands of one check after the other.

    Args:
        folder: where their output goes while they run.
        environment: variables of the commands, added to those of this process.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = {**os.environ, **environment}
        self.deadline = float("inf")  # monotonic time at which the current check has to end

    def bitlm(self, *words: str, **environment: str) -> str:
        """Run `bitlm` as a user does, and return its standard output."""
        return self.run([sys.executable, "-m", "bitlm_dist", *words], environment)

    def module(self, name: str, *words: str, **environment: str) -> Any:
        """Run a module of this package that prints JSON, and return its value."""
        command = [sys.executable, "-m", f"bitlm_dist.acceptance.{name}", *words]
        return self.parse(self.run(command, environment))

    @staticmethod
    def parse(output: str) -> Any:
        """Parse the JSON in the last line of an output, or in all of it."""
        lines = output.strip().splitlines() or [""]
        for text in (lines[-1], output):
            with suppress(ValueError):
                return json.loads(text)
        raise CheckFailedError("it printed no JSON", output)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> str:
        """Run a command to its end and return its standard output.

        Raises:
            CheckFailedError: it failed, or did not end in time.
        """
        with self.started(command, environment) as process:
            code = self.wait(process)
            if code:
                raise self._failure(code)
            return (self._folder / "stdout").read_text(errors="replace")

    def wait(
        self, process: "subprocess.Popen[bytes]", until: Callable[[], bool] = lambda: False
    ) -> int | None:
        """Wait for the end of a process, or until something is true.

        Returns:
            The exit code; None if the process still runs.

        Raises:
            CheckFailedError: neither happened in time.
        """
        start = time.monotonic()
        while not until():
            if process.poll() is not None:
                return process.returncode
            if time.monotonic() > self.deadline:
                seconds = time.monotonic() - start
                raise CheckFailedError(f"no end within {seconds:.0f} s", self._output())
            time.sleep(POLL_SECONDS)
        return None

    @contextmanager
    def started(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """Start a command; at the end of the context, its whole process group is killed."""
        with (self._folder / "stdout").open("wb") as out, (self._folder / "stderr").open("wb") as e:
            process = subprocess.Popen(
                command,
                env={**self._environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=e,
                start_new_session=True,  # Ctrl-C reaches this process alone
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _output(self) -> str:
        return "".join(text[-MAX_OUTPUT:] for text in self._texts())

    def _texts(self) -> list[str]:
        """What the command printed on standard output and on standard error."""
        return [(self._folder / n).read_text(errors="replace") for n in ("stdout", "stderr")]

    def _failure(self, code: int) -> CheckFailedError:
        """The failure of a command; the reason is its last line on standard error, or at all."""
        lines = [line.strip() for text in self._texts() for line in text.splitlines()]
        lines = [line for line in lines if line]
        said = lines[-1].removeprefix("bitlm: ")[:MAX_REASON] if lines else "it printed nothing"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return CheckFailedError(said if code == 2 else f"{how}: {said}", self._output(), code)
