"""Several contenders timed in turn, each in a process of its own under one parent.

A process each keeps peak memory apart and lets nobody inherit another's warm caches; taking turns, repeat by repeat, spreads
whatever else the machine does over all of them.
"""

import multiprocessing
import resource
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from bitlm_dist.errors import UserError, silence_announcements
from bitlm_dist.parallel import mesh


class Runner(ABC):
    """One contender, ready to run."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to do
        """What comes before every repeat and is timed apart from it, like reading a prompt."""

    @abstractmethod
    def __call__(self) -> int:
        """Do one repeat -> tokens."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back files and threads, after the last repeat."""


@dataclass(frozen=True)
class Contender:
    """What to build in the child process; ``build`` must be a module's function so that it can be sent there."""

    build: Callable[..., Runner]
    arguments: tuple[Any, ...]


class Sample(NamedTuple):
    """One repeat."""

    tokens: int
    seconds: float
    cpu_seconds: float
    preparing: float  # seconds


@dataclass(frozen=True)
class Timing:
    """Tokens a second of each repeat, and the peak memory of the process (CPU) or of the device (CUDA), bytes."""

    rates: list[float]
    cpu_seconds_per_token: float
    seconds_before: float  # median of what came before a repeat
    peak_bytes: int

    @property
    def median(self) -> float:
        """Median rate."""
        return statistics.median(self.rates)

    @property
    def spread(self) -> tuple[float, float]:
        """Slowest and fastest repeat."""
        return min(self.rates), max(self.rates)


def contest(contenders: Mapping[str, Contender], *, repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Time every contender ``repeats`` times, in turn, after ``warmup`` repeats that do not count.

    Raises:
        UserError: a contender failed; names it and its error.
    """
    context = multiprocessing.get_context("spawn")
    children: dict[str, tuple[Any, Connection]] = {}
    try:
        for name, contender in contenders.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, contender), daemon=True)
            process.start()
            theirs.close()
            children[name] = (process, ours)
            _receive(name, ours)  # built
        samples: dict[str, list[Sample]] = {name: [] for name in contenders}
        for _ in range(warmup + repeats):
            for name, (_, connection) in children.items():
                connection.send("run")
                samples[name].append(_receive(name, connection))
        return {name: _timing(samples[name][warmup:], _ask(name, pipe, "memory")) for name, (_, pipe) in children.items()}
    finally:
        for process, connection in children.values():
            connection.close()
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _timing(samples: Sequence[Sample], peak: int) -> Timing:
    return Timing(
        rates=[sample.tokens / sample.seconds for sample in samples],
        cpu_seconds_per_token=sum(sample.cpu_seconds for sample in samples) / sum(sample.tokens for sample in samples),
        seconds_before=statistics.median(sample.preparing for sample in samples),
        peak_bytes=peak,
    )


def _ask(name: str, connection: Connection, what: str) -> Any:
    connection.send(what)
    return _receive(name, connection)


def _receive(name: str, connection: Connection) -> Any:
    try:
        answer = connection.recv()
    except EOFError:
        raise UserError(f"{name} was killed, most likely for want of memory: use a smaller model or batch") from None
    if isinstance(answer, str):
        raise UserError(f"{name} failed: {answer}")
    return answer


def _serve(connection: Connection, contender: Contender) -> None:
    """The child: build, then answer until the parent hangs up."""
    silence_announcements()
    runner = None
    try:
        runner = contender.build(*contender.arguments)
        connection.send(True)
        while True:
            if connection.recv() == "memory":
                connection.send(_peak_bytes())
            else:
                connection.send(_timed(runner))
    except EOFError:
        return
    except Exception as error:
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())}")
    finally:
        if runner is not None:
            runner.close()


def _timed(runner: Runner) -> Sample:
    entered = _now()
    runner.prepare()
    began, cpu_began = _now(), time.process_time()
    tokens = runner()
    ended = _now()
    return Sample(tokens, ended - began, time.process_time() - cpu_began, began - entered)


def _now() -> float:
    """Seconds, when the device has done all that it was given."""
    if mesh.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes() -> int:
    if mesh.device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
