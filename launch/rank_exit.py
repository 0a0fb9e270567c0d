"""Ranks that ended without a word: killed by a signal, or ended by native code.

Such a rank cannot report its failure. What its parent was told by the system is known, though: to
the launcher as an exit code, and to srun, which prints it.
"""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bitlm_dist.files import write_atomically
from bitlm_dist.launch.records import read_text
from bitlm_dist.strict_json import to_json

# What most often sends the signal; a message of the system itself says more.
_HINTS = {
    signal.SIGKILL: "out of memory? see dmesg",
    signal.SIGBUS: "shared memory full? see df /dev/shm",
}
_SIGNAL_OF_TEXT = {signal.strsignal(number): number for number in signal.Signals}
_SRUN_LINE = re.compile(
    r"srun: error: (?P<node>\S+): tasks? (?P<first>\d+)[\d,-]*: (?P<how>.+?)( \(core dumped\))?"
)
_EXITED = re.compile(r"Exited with exit code (\d+)")
_OUT_OF_MEMORY = "Out Of Memory"

# From here on srun ends the other tasks itself.
_STEP_CANCELLED = re.compile(r"Terminating StepId=|\*\*\* (STEP|JOB) .* CANCELLED")
_MAX_EXIT_CODE = 128  # shells and containers report a signal as 128 plus its number


class RankExit(NamedTuple):
    """How srun saw a task end.

    Attributes:
        task: number of the task, which is the rank if srun starts every rank.
        node: where it ran.
        words: how it ended, e.g. "was killed by signal 9 (SIGKILL)".
        is_signal: a signal ended it.
    """

    task: int
    node: str
    words: str
    is_signal: bool


def describe_exit(code: int) -> str:
    """Describe how a process ended, as the words after its name.

    Args:
        code: its exit code; negative: the signal that killed it.
    """
    number = _signal_of(code)
    if number is None:
        return f"ended with exit code {code} and reported nothing"

    hint = _HINTS.get(number, "")
    words = f"was killed by signal {number} ({number.name})"
    return f"{words}; {hint}" if hint else words


def _signal_of(code: int) -> signal.Signals | None:
    """The signal that ended a process according to its exit code; None if none did."""
    number = -code if code < 0 else code - _MAX_EXIT_CODE
    return signal.Signals(number) if number in set(signal.Signals) else None


def report_exit(folder: Path, rank: int, code: int, time: float) -> None:
    """Record for a rank that it failed, unless it has reported a failure itself.

    Args:
        folder: the attempt folder.
        rank: global rank.
        code: its exit code; negative: the signal that killed it.
        time: a time at which it still ran, seconds since 1970.
    """
    file = folder / "failures" / f"rank-{rank}.json"
    if file.is_file():
        return

    record = {
        "time": time,
        "host": os.uname().nodename,
        "message": describe_exit(code),
        "lost_peer": False,
        "refused": False,
        "diverged": False,
        "exit_code": code,
    }
    write_atomically(file, to_json(record) + "\n")


def exits_seen_by_srun(folder: Path) -> Iterator[RankExit]:
    """Read from start.log how tasks ended before srun began to end the others, in that order."""
    for line in read_text(folder / "start.log").splitlines():
        if _STEP_CANCELLED.search(line):
            return

        if match := _SRUN_LINE.fullmatch(line.strip()):
            how = match["how"]
            exited = _EXITED.fullmatch(how)
            code = int(exited[1]) if exited else -_SIGNAL_OF_TEXT.get(how, 0)
            if how == _OUT_OF_MEMORY:
                words = "was killed by Slurm: out of memory"
            else:
                words = describe_exit(code) if code else f"ended: {how}"

            is_signal = not exited or _signal_of(code) is not None
            yield RankExit(int(match["first"]), match["node"], words, is_signal)
