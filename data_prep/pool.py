"""Workers as seen by the process that leads them: tasks in, futures out."""

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
from bitlm_dist.data_prep.worker import ONE_THREAD, Job, Task, Tasks, Usage

from bitlm_dist.errors import UserError

END_SECONDS = 10.0
# not multiprocessing, which would import the caller's main module again in every worker
START = "from bitlm_dist.data_prep.worker import main; main()"


class Pool:
    """Does tasks in other processes, or here and at once if there is one worker only.

    Used as a context; however it is left, its processes have ended then.

    Attributes:
        ended: what each process used, after :meth:`end`.
        pipe_seconds: CPU seconds of this process for handing tasks over.
    """

    def __init__(self, workers: int, job: Job) -> None:
        self.workers, self.job = workers, job
        self.ended: list[Usage] = []
        self.pipe_seconds: defaultdict[int, float] = defaultdict(float)
        self._here = Tasks(job) if workers == 1 else None
        self._threads: ThreadPoolExecutor | None = None
        self._processes: list[_Process] = []
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        if workers > 1:
            Tasks(job)  # what does not fit is said before anything is started
            try:
                for _ in range(workers):
                    process = _Process(job)
                    self._processes.append(process)
                    self._idle.put(process)
            except BaseException:
                self._kill()
                raise
            self._threads = ThreadPoolExecutor(workers)

    def use(self, tokenizer: Tokenizer) -> None:
        """The tokenizer that lies in the prepared folder, for tasks that are done here; other processes open it themselves."""
        if self._here:
            self._here.tokenizer = tokenizer

    def submit(self, task: Task) -> "Future[Any]":
        """Begin a task; the future gives what :meth:`Tasks.do` gives, or raises what it raised."""
        if self._threads:
            return self._threads.submit(self._do, task)
        assert self._here
        done: Future[Any] = Future()
        done.set_result(self._here.do(task))
        return done

    def _do(self, task: Task) -> Any:
        began, process = time.thread_time(), self._idle.get()
        try:
            return process.ask(task)
        finally:
            self._idle.put(process)
            self.pipe_seconds[threading.get_ident()] += time.thread_time() - began

    def end(self) -> None:
        """End the processes in peace, when no task is left."""
        self.ended = [process.end() for process in self._processes]
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        if self._threads:
            self._threads.shutdown(cancel_futures=True)
        self._processes, self._threads = [], None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()


class _Process:
    def __init__(self, job: Job) -> None:
        ours, theirs = Pipe()
        self._connection: Connection[Any, Any] = ours
        command = [sys.executable, "-P", "-c", START, str(theirs.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C goes to us alone, and we end them
            env={**os.environ, **ONE_THREAD},
        )
        theirs.close()
        self._send(job)
        self._job_is_known = False

    def _send(self, message: object) -> None:
        try:
            self._connection.send_bytes(pickle.dumps(message, protocol=5))
        except OSError:
            raise self._lost() from None

    def _receive(self) -> Any:
        try:
            answer, error, trace = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._lost() from None
        if error is None:
            return answer
        if not isinstance(error, UserError | OSError):
            error.add_note(f"In a worker process:\n{trace}")
        raise error

    def _lost(self) -> Exception:
        code = self._process.wait(END_SECONDS)
        return UserError(
            f"a worker process ended with code {code} (-9: perhaps the machine ran out of memory): "
            "run the same command again, with fewer --workers"
        )

    def ask(self, task: object) -> Any:
        if not self._job_is_known:
            self._receive()
            self._job_is_known = True
        self._send(task)
        return self._receive()

    def end(self) -> Usage:
        found: Usage = self.ask(None)
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()
