"""Interleaved timing of several variants, each in its own child process.

Separate processes keep peak memory apart and prevent one variant from inheriting another's warm
caches. The variants take turns, repeat by repeat, so that background load affects all of them
equally.
"""

import multiprocessing
import resource
import signal
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

import torch

from bitlm_dist.errors import UserError, filter_third_party_warnings
from bitlm_dist.parallel import mesh

MAX_CLOSING_SECONDS = 10.0  # for the processes to close their files


class BenchRunner(ABC):
    """One variant, ready to run."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to do
        """Run before every repeat, timed separately, e.g. to process a prompt."""

    @abstractmethod
    def __call__(self) -> int:
        """Run one repeat and return its number of tokens."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Release files and threads after the last repeat."""


@dataclass(frozen=True)
class Variant:
    """Function and arguments that build a runner in the child process.

    ``build`` must be a function at module level, so that it can be pickled.
    """

    build: Callable[..., BenchRunner]
    args: tuple[Any, ...]


class Repeat(NamedTuple):
    """Measurements of one repeat."""

    tokens: int
    seconds: float
    cpu_seconds: float
    prepare_seconds: float


@dataclass(frozen=True)
class Timing:
    """Measurements of one variant.

    Attributes:
        tokens_per_second: of each repeat.
        cpu_seconds_per_token: mean over the repeats.
        prepare_seconds: median duration of :meth:`BenchRunner.prepare`.
        peak_bytes: peak memory of the process (CPU) or of the device (CUDA).
    """

    tokens_per_second: list[float]
    cpu_seconds_per_token: float
    prepare_seconds: float
    peak_bytes: int

    @property
    def median(self) -> float:
        """Median tokens per second."""
        return statistics.median(self.tokens_per_second)

    @property
    def spread(self) -> tuple[float, float]:
        """Tokens per second of the slowest and the fastest repeat."""
        return min(self.tokens_per_second), max(self.tokens_per_second)


class ShowProgress(Protocol):
    """Shows one phase of a bench while it lasts; `bitlm_dist.cli.progress.work_progress` is one."""

    def __call__(
        self, what: str, total: int | None = None, unit: str = "", *, animated: bool = True
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Enter the phase; its value is called with how much of ``total`` is done.

        Not ``animated``, it is drawn only then, so that no thread runs beside a measurement.
        """


@contextmanager
def show_nothing(
    what: str, total: int | None = None, unit: str = "", *, animated: bool = True
) -> Iterator[Callable[[int], None]]:
    """A :class:`ShowProgress` without output."""
    yield lambda done: None


def time_interleaved(
    variants: Mapping[str, Variant],
    *,
    repeats: int,
    warmup: int = 1,
    show: ShowProgress = show_nothing,
) -> dict[str, Timing]:
    """Time every variant ``repeats`` times, in turn, after ``warmup`` repeats that do not count.

    Raises:
        UserError: a variant failed; names it and its error.
    """
    with _start_children(variants, show) as pipes:
        repeats_by_name: dict[str, list[Repeat]] = {name: [] for name in variants}
        num_rounds = warmup + repeats

        # one repeat of each variant per round
        with show("measuring", num_rounds * len(variants), "repeats", animated=False) as advance:
            for done in range(num_rounds):
                for number, (name, pipe) in enumerate(pipes.items(), 1):
                    repeats_by_name[name].append(_request(name, pipe, "run"))
                    advance(done * len(variants) + number)

        return {
            name: _summarize(repeats_by_name[name][warmup:], _request(name, pipe, "memory"))
            for name, pipe in pipes.items()
        }


@contextmanager
def _start_children(
    variants: Mapping[str, Variant], show: ShowProgress
) -> Iterator[dict[str, Connection]]:
    """Start a process per variant, one after the other; yield their pipes once all are set up."""
    # a forked child could not use CUDA, and would share the parent's memory
    context = multiprocessing.get_context("spawn")
    children: dict[str, tuple[BaseProcess, Connection]] = {}

    try:
        for name, variant in variants.items():
            with show(f"setting up {name}"):
                parent_end, child_end = context.Pipe()
                child = context.Process(target=_serve, args=(child_end, variant), daemon=True)
                with _interrupts_blocked():
                    child.start()
                    children[name] = (child, parent_end)

                # otherwise the death of the child would not end the pipe
                child_end.close()
                _receive(name, parent_end)  # the runner is built

        yield {name: pipe for name, (_, pipe) in children.items()}
    except BaseException:
        # an interrupted or failed bench does not wait for the repeats that are under way
        for process, _ in children.values():
            process.terminate()
        raise
    finally:
        for _, pipe in children.values():
            pipe.close()
        _await_end([process for process, _ in children.values()])


def _await_end(processes: Sequence[BaseProcess]) -> None:
    """Wait for processes that were asked to end, and kill those that hang."""
    deadline = time.monotonic() + MAX_CLOSING_SECONDS
    for process in processes:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT; processes started meanwhile never see it.

    Ctrl-C reaches every process of the terminal. The parent alone handles it, and ends the others.
    """
    # it is started with the first child, and would unblock the signal
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _summarize(measured: Sequence[Repeat], peak: int) -> Timing:
    return Timing(
        tokens_per_second=[repeat.tokens / repeat.seconds for repeat in measured],
        cpu_seconds_per_token=sum(repeat.cpu_seconds for repeat in measured)
        / sum(repeat.tokens for repeat in measured),
        prepare_seconds=statistics.median(repeat.prepare_seconds for repeat in measured),
        peak_bytes=peak,
    )


def _request(name: str, connection: Connection, what: str) -> Any:
    # What a dead child said last, if anything, is in the pipe.
    with suppress(ConnectionError):
        connection.send(what)
    return _receive(name, connection)


def _receive(name: str, connection: Connection) -> Any:
    """Receive a child's answer; raise a UserError if it failed or was killed."""
    try:
        answer = connection.recv()
    except (EOFError, ConnectionError):
        raise UserError(
            f"{name} was killed, most likely for want of memory: use a smaller model or batch"
        ) from None

    # a string is an error message
    if isinstance(answer, str):
        raise UserError(f"{name} failed: {answer}")
    return answer


def _serve(connection: Connection, variant: Variant) -> None:
    """Child process: build the runner, then answer requests until the parent hangs up."""
    filter_third_party_warnings()
    # ends with all clean-up, which a signal's default would skip
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    runner = None

    try:
        runner = variant.build(*variant.args)
        connection.send(True)
        while True:
            if connection.recv() == "memory":
                connection.send(measure_peak_bytes())
            else:
                connection.send(time_repeat(runner))
    except (EOFError, ConnectionError):  # the parent has ended
        return
    except Exception as error:
        # one line, as the parent raises it as a UserError
        with suppress(ConnectionError):
            connection.send(f"{type(error).__name__}: {' '.join(str(error).split())}")
    finally:
        if runner is not None:
            runner.close()


def time_repeat(runner: BenchRunner) -> Repeat:
    """Run one repeat in this process and time it."""
    # work that is still queued on the device must count for neither side
    entered = _synchronized_time()
    runner.prepare()

    began = _synchronized_time()
    cpu_began = time.process_time()
    tokens = runner()
    ended = _synchronized_time()

    return Repeat(tokens, ended - began, time.process_time() - cpu_began, began - entered)


def _synchronized_time() -> float:
    """Time in seconds, after the device has finished all queued work."""
    if mesh.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_peak_bytes() -> int:
    """Peak memory of this process (CPU) or of its device (CUDA)."""
    if mesh.device().type == "cuda":
        return torch.cuda.max_memory_allocated()

    # ru_maxrss is in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
