"""Tasks of a preparation, and the worker process that runs them.

Workers are started by :class:`~bitlm_dist.data_prep.pool.Pool`. A worker receives tasks from a
socket and answers each. It dies with the process that started it, whatever killed that process, so
that a later run never meets workers of an earlier one that still write.
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
from numpy.typing import NDArray

from bitlm_dist.data_prep import output_units
from bitlm_dist.data_prep.output_units import Unit
from bitlm_dist.data_prep.reading import ChunkReader, DocumentBatch
from bitlm_dist.data_prep.settings import Settings
from bitlm_dist.data_prep.sources import Chunk
from bitlm_dist.data_prep.stage_timer import StageTimer
from bitlm_dist.data_prep.statistics import ContextTokens, SparseCounts, count_pairs, count_tokens
from bitlm_dist.data_prep.tokenizer import TOKENIZER_DIR, Tokenizer
from bitlm_dist.processes import die_with_parent

SINGLE_THREAD_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Job:
    """Parameters shared by all tasks of a preparation."""

    settings: Settings
    out: Path
    validation_fraction: float


@dataclass(frozen=True)
class CountTask:
    """Task to count the tokens of units in the training split, or with ``context`` their pairs."""

    unit_names: tuple[str, ...]
    vocab_size: int
    context: ContextTokens | None


@dataclass(frozen=True)
class CountResult:
    """Counts of a :class:`CountTask`, and CPU seconds by stage."""

    token_counts: NDArray[np.int64] | None
    pair_counts: SparseCounts | None
    seconds: dict[str, float]


Task = Chunk | Unit | CountTask


@dataclass(frozen=True)
class Usage:
    """CPU seconds and peak memory of a process."""

    cpu_seconds: float
    peak_memory_bytes: int


class TaskRunner:
    """Runs tasks: reads a :class:`Chunk`, writes a :class:`Unit`, counts a :class:`CountTask`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._reader = ChunkReader(job.settings)
        self.tokenizer: Tokenizer | None = None

    def execute(self, task: Task) -> DocumentBatch | CountResult | dict[str, float]:
        """Run a task.

        Returns:
            The documents of a chunk, the CPU seconds by stage of writing a unit, or counts.
        """
        if isinstance(task, Chunk):
            return self._reader.read_chunk(task)

        if isinstance(task, CountTask):
            timer = StageTimer()
            with timer("statistics"):
                documents = output_units.training_documents(
                    self._job.out, task.unit_names, task.vocab_size
                )
                if task.context:
                    return CountResult(None, count_pairs(documents, task.context), timer.seconds)
                return CountResult(count_tokens(documents, task.vocab_size), None, timer.seconds)

        # Chunks are read before the tokenizer exists, if it is trained on them.
        if self.tokenizer is None:
            self.tokenizer = Tokenizer.from_folder(self._job.out / TOKENIZER_DIR)
        return output_units.write_unit(
            task, self.tokenizer, self._job.out, self._job.validation_fraction
        )


def process_usage() -> Usage:
    """Resources used by this process so far."""
    # Linux reports ru_maxrss in KiB.
    return Usage(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    """Serve tasks until the socket closes.

    The command line holds the socket's file descriptor and the parent's process id.
    """
    die_with_parent(int(sys.argv[2]))
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    runner: TaskRunner | None = None

    while True:
        try:
            message = pickle.loads(connection.recv_bytes())
        except EOFError:
            return

        # The first message is the job, the last is None, which asks for the usage.
        try:
            answer: object
            if isinstance(message, Job):
                runner = TaskRunner(message)
                answer = None
            elif message is None:
                answer = process_usage()
            else:
                assert runner
                answer = runner.execute(message)
            reply: tuple[Any, BaseException | None, str] = (answer, None, "")
        except Exception as error:
            reply = (None, error, traceback.format_exc())

        connection.send_bytes(pickle.dumps(reply, protocol=5))
