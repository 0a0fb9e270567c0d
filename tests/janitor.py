"""Clean up after a test run, however it ended: `python janitor.py RUN FOLDER`.

conftest.py starts it in the first process of the run. It waits until that process is gone, i.e.
until the pipe at its standard input closes. Then it kills every process that inherited the run's
variable, unmounts everything below the run's folder, and removes the folder and the shared memory
of dead owners.
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

from bitlm_dist.data.stale_resources import remove_stale_resources

RUN_VARIABLE = "BITLM_TEST_RUN"
KILL_TIMEOUT = 10.0  # seconds for killed processes to disappear


def main() -> None:
    """Wait for the end of the run and clean up."""
    run = sys.argv[1]
    folder = Path(sys.argv[2])
    # Signals that end the run must not end the janitor.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()

    # Repeated, as a process may start another one before it is killed.
    end = time.monotonic() + KILL_TIMEOUT
    while (alive := list(processes_of(run))) and time.monotonic() < end:
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)

    # Nested mounts come later in the list and must be unmounted first.
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        mount = line.split()[1]
        if Path(mount).is_relative_to(folder):
            subprocess.run(["umount", "--lazy", mount], check=False)

    shutil.rmtree(folder, ignore_errors=True)
    remove_stale_resources(Path(tempfile.gettempdir()))


def processes_of(run: str) -> Iterator[psutil.Process]:
    """Yield the processes of a run except this one."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(RUN_VARIABLE) == run:
                yield process


if __name__ == "__main__":
    main()
