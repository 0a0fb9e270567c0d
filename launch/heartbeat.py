"""Heartbeats of the ranks, and detection of ranks that hang.

A thread of every rank periodically writes a small file and watches the file of the next rank, in a
ring. So each rank does one write and one read per interval, whatever the number of ranks.

- A process that is stopped, swapped out or stuck in a call that holds the GIL writes nothing, and
  the previous rank notices.
- Ranks whose threads live but which make no step, as in a collective that one of them never
  entered, are noticed by rank 0.

The watcher writes hung.json. Every rank that sees this file prints the stacks of its threads and
exits, which ends the job. Each watcher uses its own clock only, so clocks need not agree.
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

from bitlm_dist.files import DISK_FULL, write_atomically
from bitlm_dist.formatting import format_time
from bitlm_dist.launch.attempts import ATTEMPT_VARIABLE, Limits
from bitlm_dist.launch.rank_log import HANG_LINE
from bitlm_dist.strict_json import to_json

NO_STEP = -1


class Heartbeat:
    """Heartbeat thread of one rank; a context manager.

    Args:
        attempt: the attempt folder; None: do nothing.
        limits: interval and timeouts.
        rank: global rank of this process.
        world_size: number of ranks.
    """

    def __init__(self, attempt: Path | None, limits: Limits, rank: int, world_size: int) -> None:
        self._enabled = attempt is not None
        self._attempt_folder = attempt or Path()
        self._limits = limits
        self._rank = rank
        self._world_size = world_size
        self._step_fn: Callable[[], int] = lambda: NO_STEP
        self._stop_event = Event()
        self._thread = Thread(target=self._run, daemon=True, name="heartbeat")

        # last heartbeat that was seen of the next rank with its time, and when it was new
        self._next_beat = (b"", 0)
        self._has_next_beat = False
        self._next_beat_at = time.monotonic()

        # progress of this rank
        self._first_step = NO_STEP
        self._last_step = NO_STEP
        self._last_step_at = time.monotonic()
        self._last_round_at = time.monotonic()

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], rank: int, world_size: int
    ) -> "Heartbeat":
        """Heartbeat of this process; a no-op outside a launched job."""
        if ATTEMPT_VARIABLE not in environment:
            return cls(None, Limits(), rank, world_size)

        attempt = Path(environment[ATTEMPT_VARIABLE])
        limits = json.loads((attempt / "attempt.json").read_text())["limits"]
        return cls(attempt, Limits.from_record(limits), rank, world_size)

    def track_steps(self, step_fn: Callable[[], int]) -> None:
        """Set the function that returns the number of completed steps."""
        self._step_fn = step_fn

    def __enter__(self) -> "Heartbeat":
        if self._enabled:
            self._write_beat()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._enabled:
            self._stop_event.set()
            self._thread.join()

            # without the file the previous rank stops watching this one
            self._beat_file(self._rank).unlink(missing_ok=True)

    def _beat_file(self, rank: int) -> Path:
        return self._attempt_folder / "beats" / f"rank-{rank}"

    def _run(self) -> None:
        while not self._stop_event.wait(self._limits.heartbeat_interval):
            try:
                self._write_beat()
                self._ignore_global_pause()
                self._check_next_rank()
                if self._rank == 0:
                    self._check_progress()
                if (self._attempt_folder / "hung.json").exists():
                    self._abort()
            except (OSError, ValueError):
                continue  # the file system may be unavailable for a moment

    def _write_beat(self) -> None:
        step = self._step_fn()
        self._first_step = step if self._first_step == NO_STEP else self._first_step

        # after the first step nothing is imported or compiled any more, so the short timeouts apply
        has_stepped = step > self._first_step
        beat = {
            "time": time.time(),
            "step": step,
            "begun": has_stepped,
            "host": os.uname().nodename,
            "process": os.getpid(),
        }

        # renamed into place, but not flushed to disk: a heartbeat need not survive a power cut
        file = self._beat_file(self._rank)
        partial = file.with_name(f".{file.name}")
        try:
            partial.write_text(to_json(beat))
            partial.rename(file)
        except OSError as error:
            # a full disk is no hang; the time of the last beat can be renewed without space
            if error.errno not in DISK_FULL or not file.exists():
                raise
            os.utime(file)

    def _ignore_global_pause(self) -> None:
        """Restart the timeouts if this thread itself was paused.

        Then all processes, or the file system, may have stopped together, and the silence of the
        next rank proves nothing.
        """
        now = time.monotonic()
        if now - self._last_round_at > 3 * self._limits.heartbeat_interval + 1:
            self._next_beat_at = self._last_step_at = now
        self._last_round_at = now

    def _check_next_rank(self) -> None:
        """Report the next rank in the ring if its heartbeat has not changed for too long."""
        if self._world_size == 1:
            return

        next_rank = (self._rank + 1) % self._world_size
        now = time.monotonic()
        try:
            file = self._beat_file(next_rank)
            beat = file.read_bytes(), file.stat().st_mtime_ns
        except FileNotFoundError:  # not started yet, or exited in an orderly way
            self._has_next_beat = False
            return

        if beat != self._next_beat or not self._has_next_beat:
            self._next_beat = beat
            self._has_next_beat = True
            self._next_beat_at = now
            return

        next_beat = json.loads(beat[0])
        if now - self._next_beat_at > (
            self._limits.heartbeat_timeout if next_beat["begun"] else self._limits.startup_timeout
        ):
            self._report_hang(
                next_rank, next_beat, f"gave no sign of life for {now - self._next_beat_at:.0f} s"
            )

    def _check_progress(self) -> None:
        """Report the slowest rank if no step was made for too long. Called on rank 0."""
        step = self._step_fn()
        now = time.monotonic()
        if step != self._last_step:
            self._last_step = step
            self._last_step_at = now
            return

        limit = (
            self._limits.step_timeout
            if self._last_step > self._first_step
            else self._limits.startup_timeout
        )

        if now - self._last_step_at > limit:
            rank, beat = self._slowest_rank()
            self._report_hang(
                rank,
                beat,
                f"is at step {beat['step']}, "
                f"and no step was made for {now - self._last_step_at:.0f} s",
            )

    def _slowest_rank(self) -> tuple[int, dict[str, Any]]:
        """Find a rank without a heartbeat, else the one with the fewest steps.

        Returns:
            The rank and its last heartbeat.
        """
        beats: list[tuple[int, dict[str, Any]]] = []
        for rank in range(self._world_size):
            try:
                beats.append((rank, json.loads(self._beat_file(rank).read_text())))
            except (OSError, ValueError):
                return rank, {"host": "a node that is not known", "step": NO_STEP}

        return min(beats, key=lambda pair: pair[1]["step"])

    def _report_hang(self, rank: int, beat: Mapping[str, Any], what: str) -> None:
        """Write hung.json, unless another rank has done so."""
        file = self._attempt_folder / "hung.json"
        if not file.exists():
            record = {"rank": rank, "host": beat["host"], "what": what, "noticed_by": self._rank}
            write_atomically(file, to_json(record) + "\n")

    def _abort(self) -> None:
        print(f"{HANG_LINE} ({format_time()})", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)

        # not sys.exit: the main thread may never return from a collective
        os._exit(1)
