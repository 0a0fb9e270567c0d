"""What one process does with chunks and units, and the process itself, which :class:`~bitlm_dist.data_prep.pool.Pool` starts.

A worker gets tasks from a socket and answers each. It dies with the process that started it, whatever killed that, so that
no second run meets the leavings of a first that still writes.
"""

import ctypes
import os
import pickle
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bitlm_dist.data_prep import units
from bitlm_dist.data_prep.reading import Batch, Reader
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.data_prep.sources import Chunk
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.data_prep.units import Unit

PR_SET_PDEATHSIG = 1
TOKENIZER = "tokenizer"  # folder of the prepared folder
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Job:
    """What all tasks of a preparation share."""

    settings: Settings
    out: Path
    validation: float


@dataclass(frozen=True)
class Usage:
    """CPU seconds and the most memory (bytes) that a process used."""

    seconds: float
    memory: int


class Tasks:
    """Does tasks: a :class:`Chunk` is read, a :class:`Unit` is written."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._reader = Reader(job.settings)
        self.tokenizer: Tokenizer | None = None

    def do(self, task: Chunk | Unit) -> Batch | dict[str, float]:
        """Read a chunk -> its documents; write a unit -> CPU seconds by stage."""
        if isinstance(task, Chunk):
            return self._reader.read(task)
        if self.tokenizer is None:
            self.tokenizer = Tokenizer.of_folder(self._job.out / TOKENIZER)
        return units.write(task, self.tokenizer, self._job.out, self._job.validation)


def usage() -> Usage:
    """Of this process so far."""
    return Usage(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it was gone before we asked


def main() -> None:
    """Serve tasks until the socket closes. Arguments: its file descriptor, the parent's process id."""
    _die_with(int(sys.argv[2]))
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    tasks: Tasks | None = None
    while True:
        try:
            message = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer: object
            if isinstance(message, Job):
                tasks, answer = Tasks(message), None
            elif message is None:
                answer = usage()
            else:
                assert tasks
                answer = tasks.do(message)
            reply: tuple[Any, BaseException | None, str] = (answer, None, "")
        except Exception as error:
            reply = (None, error, traceback.format_exc())
        connection.send_bytes(pickle.dumps(reply, protocol=5))
