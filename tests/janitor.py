"""Cleans up after a test run, however it ended: `python janitor.py RUN FOLDER`, started by conftest.py in the first process.

It waits until that process is gone: the pipe that is its standard input closes. Then it ends every process that inherited the
run's variable, unmounts what is mounted in the run's folder, and removes the folder and the shared memory of dead owners.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from bitlm_dist.data.leftovers import remove_leftovers

VARIABLE = "BITLM_TEST_RUN"
PATIENCE = 10.0  # seconds until processes that were killed must be gone


def main() -> None:
    """The command line."""
    run, folder = sys.argv[1], Path(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what ends the run must not end this
    sys.stdin.read()

    end = time.monotonic() + PATIENCE
    while (alive := list(processes_of(run))) and time.monotonic() < end:
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        mount = line.split()[1]
        if Path(mount).is_relative_to(folder):
            subprocess.run(["umount", "--lazy", mount], check=False)
    shutil.rmtree(folder, ignore_errors=True)
    remove_leftovers(Path(tempfile.gettempdir()))


def processes_of(run: str) -> Iterator[psutil.Process]:
    """Processes of a run, other than this one."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(VARIABLE) == run:
                yield process


if __name__ == "__main__":
    main()
