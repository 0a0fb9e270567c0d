"""The checkpoints of a run in training: saved beside it, judged by the step that follows, the newest healthy ones kept."""

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitlm_dist.checkpoint import retention, store
from bitlm_dist.checkpoint.saver import Saved, Saver
from bitlm_dist.checkpoint.store import SaveError
from bitlm_dist.config import CheckpointConfig
from bitlm_dist.errors import UserError, say
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.parallel.sliced import Sliced

MAX_FAILED_SAVES = 3  # in a row
POLL = 0.05  # seconds
UNHEALTHY = "its loss or gradient norm, or that of the next step, was not finite"
Contents = tuple[Mapping[str, Sliced], Mapping[str, Any]]


class Checkpoints:
    """Every process of the job makes one and calls the same methods in the same order.

    Args:
        root: the run's ``checkpoints`` folder.
        config: when to save, what to keep.
        layout: of the job.
    """

    def __init__(self, root: Path, config: CheckpointConfig, layout: Layout) -> None:
        self._root, self._config, self._layout = root, config, layout
        self.saver = Saver(root, layout)
        self.newest: int | None = None  # step that was loaded, or saved last
        self.report: Callable[[Saved], None] = lambda saved: None
        self._health: dict[int, bool | None] = {}  # of all checkpoints, on the first rank
        self._failed = 0  # in a row
        self._last_time = time.monotonic()
        self._unproven: tuple[int, bool] | None = None  # saved step, whether it was healthy itself
        self._verdict: tuple[int, bool] | None = None  # of a step that may not be completed yet

    def find(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from, every file of it verified, and its state; None: there is none.

        Raises:
            UserError: on every rank: it is damaged, and ``checkpoint.fallback`` is off or there is none before it.
        """
        steps = mesh.from_first(store.complete_steps(self._root), self._layout)
        unhealthy: list[Path] = []
        for folder in (store.folder_of(self._root, step) for step in reversed(steps)):
            problem = self._problem_of(folder)
            if problem and not self._config.fallback:
                raise UserError(f"{problem}: remove {folder} or set checkpoint.fallback = true to go on from an older checkpoint")
            if problem:
                self._set_aside(folder, "damaged", f"CHECKPOINT DAMAGED: {problem}")
            elif mesh.from_first(store.read_health(folder), self._layout) is False and self._config.fallback:
                unhealthy.append(folder)
            else:
                for newer in unhealthy:
                    self._set_aside(newer, "unhealthy", f"CHECKPOINT NOT HEALTHY: {newer}: {UNHEALTHY}")
                return self._found(folder)
        if unhealthy:
            return self._found(unhealthy[0])
        if steps:
            raise UserError(f"none of the checkpoints in {self._root} is whole: restore one, or choose another run.dir")
        return None

    def _found(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        self._health = {step: store.read_health(store.folder_of(self._root, step)) for step in store.complete_steps(self._root)}
        state = store.read_state(folder)
        self.newest = step = int(state["step"])
        if self._health.get(step) is False:
            self._say(f"{folder}: {UNHEALTHY}; going on from it, as no weight was changed by such a step")
        if self._health.get(step) is None:
            self._unproven = step, state.get("finite", True)
        return folder, state

    def _problem_of(self, folder: Path) -> str:
        """What the ranks together find wrong; each hashes some of the files.

        Raises:
            UserError: on every rank: it is of another format, or damaged for some ranks and not for the first.
        """
        damage = fatal = ""
        try:
            store.verify(folder, self._layout.rank, self._layout.world)
        except store.DamagedError as error:
            damage = str(error)
        except UserError as error:
            fatal = str(error)
        reports = mesh.from_all((damage, fatal, socket.gethostname()), self._layout)
        for _, problem, _ in reports:
            if problem:
                raise UserError(problem)
        found = next(((rank, text, host) for rank, (text, _, host) in enumerate(reports) if text), None)
        if found is None:
            return ""
        rank, text, host = found
        if not mesh.from_first(self._layout.rank == 0 and _is_damaged(folder), self._layout):
            raise UserError(f"rank {rank} on {host}: {text}; the first rank finds it whole: see how that node mounts run.dir")
        return str(text)

    def _set_aside(self, folder: Path, why: str, text: str) -> None:
        problem = where = ""
        if self._layout.rank == 0:
            try:
                where = str(store.set_aside(folder, why))
            except OSError as error:
                problem = f"{folder} could not be renamed ({error}): move it away"
        problem = mesh.from_first(problem, self._layout)
        if problem:
            raise UserError(problem)
        self._say(f"{text}; it is now {where}; going on from an older one")

    @property
    def overdue(self) -> bool:
        """Whether ``every_minutes`` have passed by this process's clock."""
        every = 60 * self._config.every_minutes
        return every > 0 and time.monotonic() - self._last_time >= every

    def save(self, step: int, collect: Callable[[], Contents], finite: bool, wait: bool) -> None:
        """Begin a save, after the one before it; complete it if ``wait`` or unless saves are asynchronous.

        Args:
            step: whose checkpoint it is.
            collect: returns tensors and state, see :meth:`Saver.begin`.
            finite: whether loss and gradient norm of this step were.

        Raises:
            SaveError: on every rank, if saves failed three times in a row.
        """
        if self.saver.pending:
            self.complete()
        self._last_time = time.monotonic()
        self._unproven = step, finite
        began = time.perf_counter()
        tensors, state = collect()
        self._trying(lambda: self.saver.begin(step, tensors, {**state, "finite": finite}, began))
        if self.saver.pending and (wait or not self._config.asynchronous):
            self.complete()

    def complete(self) -> None:
        """Wait for the save that was begun, and complete it.

        Raises:
            SaveError: see :meth:`save`.
        """

        def finish() -> None:
            saved = self.saver.finish()
            self.newest, self._failed = saved.step, 0
            self._health[saved.step] = None
            self.report(saved)

        # not in one collective, whose time limit a slow disk may exceed
        while self._layout.world > 1 and int(mesh.most_of_all(torch.tensor(int(self.saver.writing), device=mesh.device()))):
            time.sleep(POLL)
        self._trying(finish)
        self._act_on_verdict()

    def _trying(self, action: Callable[[], None]) -> None:
        """A disk that is full for a while does not stop training, one that stays so does."""
        try:
            action()
        except SaveError as error:
            self._failed += 1
            self._unproven = self._verdict = None
            if self._failed == MAX_FAILED_SAVES:
                raise
            self._say(f"{error}; training goes on ({self._failed} of {MAX_FAILED_SAVES} failed saves in a row end it)")

    def judge(self, step: int, finite: bool) -> None:
        """A step was taken: the checkpoint of the step before it is healthy if both were."""
        if self._unproven is not None and self._unproven[0] == step - 1:
            self._verdict = step - 1, self._unproven[1] and finite
            self._unproven = None
            self._act_on_verdict()

    def _act_on_verdict(self) -> None:
        if self._verdict is None or self.saver.pending:
            return
        (step, healthy), self._verdict = self._verdict, None
        if self._layout.rank == 0 and step in self._health:
            self._health[step] = healthy
            try:
                store.write_health(store.folder_of(self._root, step), healthy)
                retention.tidy(self._root, self._health, self._config.keep, self._config.keep_every_steps)
            except OSError as error:
                self._say(f"checkpoints in {self._root} could not be tidied: {error}")

    def _say(self, text: str) -> None:
        if self._layout.rank == 0:
            say(text)


def _is_damaged(folder: Path) -> bool:
    try:
        store.verify(folder)
    except store.DamagedError:
        return True
    return False
