"""What one process does with chunks and units, and the process itself, which :class:`~bitlm_dist.data_prep.pool.Pool` starts.

A worker gets tasks from a socket and answers each. It dies with the process that started it, whatever killed that, so that
no second run meets the leavings of a first that still writes.
"""

import pickle
import resource
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from bitlm_dist.data_prep import units
from bitlm_dist.data_prep.clock import Clock
from bitlm_dist.data_prep.reading import Batch, Reader
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.data_prep.sources import Chunk
from bitlm_dist.data_prep.statistics import Context, Sparse, count_pairs, count_tokens
from bitlm_dist.data_prep.tokenizer import TOKENIZER, Tokenizer
from bitlm_dist.data_prep.units import Unit
from numpy.typing import NDArray

from bitlm_dist.processes import die_with

ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Job:
    """What all tasks of a preparation share."""

    settings: Settings
    out: Path
    validation: float


@dataclass(frozen=True)
class Count:
    """Units of the training split whose tokens, or with ``context`` whose pairs, are to be counted."""

    names: tuple[str, ...]
    vocabulary: int
    context: Context | None


@dataclass(frozen=True)
class Counted:
    """Counts of a :class:`Count`, and CPU seconds."""

    tokens: NDArray[np.int64] | None
    pairs: Sparse | None
    seconds: dict[str, float]


Task = Chunk | Unit | Count


@dataclass(frozen=True)
class Usage:
    """CPU seconds and the most memory (bytes) that a process used."""

    seconds: float
    memory: int


class Tasks:
    """Does tasks: a :class:`Chunk` is read, a :class:`Unit` is written, a :class:`Count` counts."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._reader = Reader(job.settings)
        self.tokenizer: Tokenizer | None = None

    def do(self, task: Task) -> Batch | Counted | dict[str, float]:
        """Read a chunk -> its documents; write a unit -> CPU seconds by stage; count -> counts."""
        if isinstance(task, Chunk):
            return self._reader.read(task)
        if isinstance(task, Count):
            clock = Clock()
            with clock("statistics"):
                documents = units.training_documents(self._job.out, task.names, task.vocabulary)
                if task.context:
                    return Counted(None, count_pairs(documents, task.context), clock.seconds)
                return Counted(count_tokens(documents, task.vocabulary), None, clock.seconds)
        if self.tokenizer is None:
            self.tokenizer = Tokenizer.of_folder(self._job.out / TOKENIZER)
        return units.write(task, self.tokenizer, self._job.out, self._job.validation)


def usage() -> Usage:
    """Of this process so far."""
    return Usage(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    """Serve tasks until the socket closes. Arguments: its file descriptor, the parent's process id."""
    die_with(int(sys.argv[2]))
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
