"""Signs of life of the ranks, and who notices when one stops giving them.

A thread of every rank writes a small file now and then and watches that of the next rank, in a ring: whatever the number of ranks,
each does one write and one read a beat. A process that is stopped, swapped out or stuck in a call that holds Python's lock writes
nothing, and the rank before it notices. Ranks whose threads live but which make no step, as in a collective that one of them never
entered, are noticed by rank 0. Whoever notices writes hung.json; every rank that sees it prints where its threads are and ends, and
so does the job. Times are taken on the watcher's own clock, so clocks need not agree.
"""

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

from bitlm_dist.launch.attempts import VARIABLE, Limits

from bitlm_dist.files import to_json, write_atomically

NO_STEP = -1


class Heartbeat:
    """The thread of one rank; a context manager.

    Args:
        attempt: the attempt's folder; None: nobody watches.
        limits: of the watch.
        rank, world: of this process.
    """

    def __init__(self, attempt: Path | None, limits: Limits, rank: int, world: int) -> None:
        self._watched, self._attempt = attempt is not None, attempt or Path()
        self._limits, self._rank, self._world = limits, rank, world
        self._step: Callable[[], int] = lambda: NO_STEP
        self._end, self._thread = Event(), Thread(target=self._run, daemon=True, name="heartbeat")
        self._next, self._next_seen, self._next_at = b"", False, time.monotonic()
        self._first, self._last, self._last_at = NO_STEP, NO_STEP, time.monotonic()
        self._round = time.monotonic()

    @classmethod
    def of_environment(cls, environment: Mapping[str, str], rank: int, world: int) -> "Heartbeat":
        """That of this process; it does nothing where no launcher started it."""
        if VARIABLE not in environment:
            return cls(None, Limits(), rank, world)
        attempt = Path(environment[VARIABLE])
        limits = json.loads((attempt / "attempt.json").read_text())["limits"]
        return cls(attempt, Limits(**limits), rank, world)

    def watch(self, step: Callable[[], int]) -> None:
        """From now on ``step`` says how many steps are done."""
        self._step = step

    def __enter__(self) -> "Heartbeat":
        if self._watched:
            self._beat()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._watched:
            self._end.set()
            self._thread.join()
            self._file(self._rank).unlink(missing_ok=True)  # the rank before it stops watching

    def _file(self, rank: int) -> Path:
        return self._attempt / "beats" / f"rank-{rank}"

    def _run(self) -> None:
        while not self._end.wait(self._limits.beat):
            try:
                self._beat()
                self._forgive_a_pause()
                self._look_at_next()
                if self._rank == 0:
                    self._look_at_steps()
                if (self._attempt / "hung.json").exists():
                    self._give_up()
            except (OSError, ValueError):
                continue  # the file system is away for a moment

    def _beat(self) -> None:
        step = self._step()
        self._first = step if self._first == NO_STEP else self._first
        begun = step > self._first  # the first step is made: nothing is imported or compiled any more
        beat = {"time": time.time(), "step": step, "begun": begun, "host": os.uname().nodename, "process": os.getpid()}
        partial = self._file(self._rank).with_name(f".rank-{self._rank}")
        partial.write_text(to_json(beat))  # not flushed to disk: it is worth nothing after a power cut
        partial.rename(self._file(self._rank))

    def _forgive_a_pause(self) -> None:
        """All processes may have been stopped together, or the file system: then the next one's silence says nothing."""
        now = time.monotonic()
        if now - self._round > 3 * self._limits.beat + 1:
            self._next_at = self._last_at = now
        self._round = now

    def _look_at_next(self) -> None:
        if self._world == 1:
            return
        number, now = (self._rank + 1) % self._world, time.monotonic()
        try:
            beat = self._file(number).read_bytes()
        except FileNotFoundError:  # not yet there, or gone in peace
            self._next_seen = False
            return
        if beat != self._next or not self._next_seen:
            self._next, self._next_seen, self._next_at = beat, True, now
            return
        told = json.loads(beat)
        if now - self._next_at > (self._limits.frozen if told["begun"] else self._limits.start):
            self._accuse(number, told, f"gave no sign of life for {now - self._next_at:.0f} s")

    def _look_at_steps(self) -> None:
        step, now = self._step(), time.monotonic()
        if step != self._last:
            self._last, self._last_at = step, now
            return
        limit = self._limits.stalled if self._last > self._first else self._limits.start
        if now - self._last_at > limit:
            number, beat = self._slowest()
            self._accuse(number, beat, f"is at step {beat['step']}, and no step was made for {now - self._last_at:.0f} s")

    def _slowest(self) -> tuple[int, dict[str, Any]]:
        """A rank that has not begun, else the one with the fewest steps."""
        beats: list[tuple[int, dict[str, Any]]] = []
        for number in range(self._world):
            try:
                beats.append((number, json.loads(self._file(number).read_text())))
            except (OSError, ValueError):
                return number, {"host": "a node that is not known", "step": NO_STEP}
        return min(beats, key=lambda pair: pair[1]["step"])

    def _accuse(self, rank: int, beat: Mapping[str, Any], what: str) -> None:
        file = self._attempt / "hung.json"
        if not file.exists():
            record = {"rank": rank, "host": beat["host"], "what": what, "noticed_by": self._rank}
            write_atomically(file, to_json(record) + "\n")

    def _give_up(self) -> None:
        print("bitlm: a rank hangs; this one is here:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)
