"""Logs of the ranks: following a file that grows, and what matters in it."""

import re
from contextlib import suppress
from pathlib import Path

TIME_PATTERN = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d ")  # starts a line off a terminal
HANG_LINE = "bitlm: a rank hangs; this one is here"  # followed by the stacks of all threads

_TRACEBACK = "Traceback (most recent call last)"
_FATAL_ERROR = "Fatal Python error"
_AFTER_DEATH = "resource_tracker"  # Python's helper, which cleans up after a killed process
_FAILED_RANK = re.compile(r"bitlm: rank \d+ on \S+ failed: ")  # ends a traceback

# Lines of bitlm's own, which come after the traceback of an error that training survives.
_OWN_LINE = re.compile(rf"bitlm: |{TIME_PATTERN.pattern}")


class LogFollower:
    """Reads the complete lines that were added to a file since the last call.

    Args:
        file: the log; need not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._num_bytes_read = 0

    def new_lines(self) -> list[str]:
        """Complete lines since the last call."""
        with suppress(FileNotFoundError), self._file.open("rb") as stream:
            stream.seek(self._num_bytes_read)
            new = stream.read()
            complete_lines = new[: new.rfind(b"\n") + 1]
            self._num_bytes_read += len(complete_lines)
            return complete_lines.decode(errors="replace").splitlines()

        return []


class TracebackFilter:
    """Leaves out tracebacks and stacks: a rank that only lost another one prints them, too.

    They end with the next line of bitlm's own, because libraries print stacks of C++ after them.
    """

    def __init__(self) -> None:
        self._is_inside = False

    def passes(self, line: str) -> bool:
        """True if a line is no part of a traceback. Call it with every line, in order."""
        if _TRACEBACK in line or line.startswith((HANG_LINE, _FATAL_ERROR)):
            self._is_inside = True
        elif self._is_inside and _OWN_LINE.match(line) and not _FAILED_RANK.match(line):
            self._is_inside = False

        return not self._is_inside and not _FAILED_RANK.match(line)


def last_lines(file: Path, count: int, max_traceback_lines: int) -> list[str]:
    """The end of a log: a traceback at its end as a whole, else the last lines.

    Args:
        file: the log.
        count: number of lines.
        max_traceback_lines: number of lines of a traceback that is shown as a whole.
    """
    text = file.read_text(errors="replace")
    lines = [line for line in text.splitlines() if _AFTER_DEATH not in line]
    tail = lines[-max(count, max_traceback_lines) :]
    starts = [i for i, line in enumerate(tail) if _TRACEBACK in line] if max_traceback_lines else []
    return tail[min([*starts, max(0, len(tail) - count)]) :]


def main_stack_in(file: Path) -> list[str]:
    """The stack that a rank's main thread had when another rank hung; empty if it printed none."""
    lines = file.read_text(errors="replace").splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(HANG_LINE)]
    if not starts:
        return []

    # faulthandler prints the main thread last, with a blank line between threads
    threads = "\n".join(lines[starts[-1] + 1 :]).strip().split("\n\n")
    return threads[-1].splitlines()
