"""Worker processes as seen by the process that leads them: tasks in, futures out."""

import os
import pickle
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.data_prep.worker import SINGLE_THREAD_ENVIRONMENT, Job, Task, TaskRunner, Usage
from bitlm_dist.errors import UserError

EXIT_TIMEOUT = 10.0
# multiprocessing would import the caller's main module again in every worker.
WORKER_CODE = "from bitlm_dist.data_prep.worker import main; main()"


class Pool:
    """Runs tasks in worker processes, or synchronously in this process if there is one worker.

    Used as a context manager; its processes have ended once the context exits, for any reason.

    Attributes:
        num_workers: Number of workers.
        job: The job that all tasks belong to.
        worker_usage: Resources used by each process; a worker's is there after :meth:`shut_down`.
        pipe_seconds: CPU seconds that this process spent on handing tasks over, by thread.
    """

    def __init__(self, num_workers: int, job: Job) -> None:
        self.num_workers = num_workers
        self.job = job
        self.worker_usage: list[Usage] = []
        self.pipe_seconds: defaultdict[int, float] = defaultdict(float)

        self._local_runner = TaskRunner(job) if num_workers == 1 else None
        self._threads: ThreadPoolExecutor | None = None
        self._processes: list[_Process] = []
        self._idle: SimpleQueue[_Process] = SimpleQueue()

        if num_workers > 1:
            # Raises for bad settings before any process is started.
            TaskRunner(job)
            try:
                for _ in range(num_workers):
                    process = _Process(job)
                    self._processes.append(process)
                    self._idle.put(process)
            except BaseException:
                self._kill()
                raise

            # One thread per process, blocked on its connection while a task runs.
            self._threads = ThreadPoolExecutor(num_workers)

    @property
    def max_in_flight(self) -> int:
        """Number of unfinished tasks to keep submitted, so that no worker idles."""
        return 0 if self.num_workers == 1 else self.num_workers + 1

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Set the tokenizer for tasks that run in this process.

        Worker processes open the copy in the prepared folder themselves.
        """
        if self._local_runner:
            self._local_runner.tokenizer = tokenizer

    def submit(self, task: Task) -> "Future[Any]":
        """Start a task.

        Returns:
            A future with the result of :meth:`TaskRunner.execute`, or its exception.
        """
        if self._threads:
            return self._threads.submit(self._run_in_worker, task)

        assert self._local_runner
        future: Future[Any] = Future()
        future.set_result(self._local_runner.execute(task))
        return future

    def _run_in_worker(self, task: Task) -> Any:
        start = time.thread_time()
        process = self._idle.get()
        try:
            return process.request(task)
        finally:
            self._idle.put(process)
            self.pipe_seconds[threading.get_ident()] += time.thread_time() - start

    def shut_down(self) -> None:
        """Shut the processes down cleanly; no task may be pending."""
        self.worker_usage += [process.shut_down() for process in self._processes]
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)

        self._processes = []
        self._threads = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()


class _Process:
    """One worker process and the connection to it."""

    def __init__(self, job: Job) -> None:
        parent_end, child_end = Pipe()
        self._connection: Connection[Any, Any] = parent_end
        command = [
            sys.executable,
            "-P",
            "-c",
            WORKER_CODE,
            str(child_end.fileno()),
            str(os.getpid()),
        ]
        self._process = subprocess.Popen(
            command,
            pass_fds=[child_end.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C reaches only this process, which ends the workers
            env={**os.environ, **SINGLE_THREAD_ENVIRONMENT},
        )
        # Without its own copy, this process sees EOF when the worker dies.
        child_end.close()

        # The answer is awaited at the first request, so that all workers start in parallel.
        self._send(job)
        self._job_is_acknowledged = False

    def _send(self, message: object) -> None:
        try:
            self._connection.send_bytes(pickle.dumps(message, protocol=5))
        except OSError:
            raise self._worker_died() from None

    def _receive(self) -> Any:
        """Wait for an answer; an exception in the worker is raised here."""
        try:
            answer, error, trace = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._worker_died() from None
        if error is None:
            return answer

        # Errors of the user's input need no traceback.
        if not isinstance(error, UserError | OSError):
            error.add_note(f"In a worker process:\n{trace}")
        raise error

    def _worker_died(self) -> Exception:
        code = self._process.wait(EXIT_TIMEOUT)
        return UserError(
            f"a worker process ended with code {code} "
            "(-9: perhaps the machine ran out of memory): "
            "run the same command again, with fewer --workers"
        )

    def request(self, task: object) -> Any:
        """Send a task and wait for its result."""
        if not self._job_is_acknowledged:
            self._receive()
            self._job_is_acknowledged = True

        self._send(task)
        return self._receive()

    def shut_down(self) -> Usage:
        """Ask for the resources used so far; the process is killed afterwards."""
        usage: Usage = self.request(None)
        return usage

    def kill(self) -> None:
        """Kill the process and close the connection."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
