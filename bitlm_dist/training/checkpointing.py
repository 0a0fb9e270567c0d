"""Manage the checkpoints of a run during training.

Saves asynchronously, marks a checkpoint healthy once the next step was finite, and keeps the latest
healthy ones.
"""

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bitlm_dist.checkpoint import retention, store
from bitlm_dist.checkpoint.saver import Saver, SaveStats
from bitlm_dist.checkpoint.steps import (
    all_steps,
    complete_steps,
    folder_of,
    read_health,
    read_train_state,
)
from bitlm_dist.checkpoint.store import SaveError
from bitlm_dist.errors import UserError, log_to_stderr, os_error_message
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.training.config import CheckpointConfig

MAX_FAILED_SAVES = 3  # in a row
POLL_SECONDS = 0.05
UNHEALTHY_REASON = "its loss or gradient norm, or that of the next step, was not finite"
CheckpointContents = tuple[Mapping[str, ShardedTensor], Mapping[str, Any]]


class CheckpointManager:
    """Saves, loads and deletes the checkpoints of one run.

    Collective: all ranks must construct one and call its methods in the same order.

    Args:
        root: the run's ``checkpoints`` folder.
        config: when to save, and which checkpoints to keep.
        layout: the parallel layout of the job.
    """

    def __init__(self, root: Path, config: CheckpointConfig, layout: ParallelLayout) -> None:
        self._root = root
        self._config = config
        self._layout = layout
        self.saver = Saver(root, layout)
        self.latest_step: int | None = None  # step that was loaded or saved last
        self.on_saved: Callable[[SaveStats], None] = lambda saved: None

        # by step, of all checkpoints, on rank 0 only; None: not known yet
        self._health: dict[int, bool | None] = {}
        self._num_failed_saves = 0  # in a row
        self.last_failure = ""  # why the last save failed, and what helps
        self._last_save_time = time.monotonic()

        # the step that was saved, and whether it was finite; its health depends on the next step
        self._awaiting_next_step: tuple[int, bool] | None = None
        # step and health that cannot be written yet, as the save may not be completed
        self._pending_health: tuple[int, bool] | None = None

    def find_resume_point(self) -> tuple[Path, dict[str, Any]] | None:
        """Find the checkpoint to resume from, and verify all of its files.

        With ``checkpoint.fallback``, damaged checkpoints and unhealthy ones are renamed and an
        older one is taken.

        Returns:
            The checkpoint and its train state. None if there is no checkpoint.

        Raises:
            UserError: on every rank: the checkpoint is damaged, and ``checkpoint.fallback`` is off
                or no older one is intact.
        """
        steps = mesh.broadcast_object(all_steps(self._root), self._layout)
        unhealthy: list[Path] = []

        for folder in (folder_of(self._root, step) for step in reversed(steps)):
            problem = self._verify_on_all_ranks(folder)
            if problem and not self._config.fallback:
                raise UserError(
                    f"{problem}: remove {folder} or set checkpoint.fallback = true to go on from "
                    "an older checkpoint"
                )

            if problem:
                self._quarantine(folder, "damaged", f"CHECKPOINT DAMAGED: {problem}")
            elif (
                mesh.broadcast_object(read_health(folder), self._layout) is False
                and self._config.fallback
            ):
                # renamed only once a healthy one is found: it may be the best there is
                unhealthy.append(folder)
            else:
                for newer in unhealthy:
                    self._quarantine(
                        newer, "unhealthy", f"CHECKPOINT NOT HEALTHY: {newer}: {UNHEALTHY_REASON}"
                    )
                return self._resume_from(folder)

        if unhealthy:
            return self._resume_from(unhealthy[0])
        if steps:
            raise UserError(
                f"none of the checkpoints in {self._root} is intact: "
                "restore one, or choose another run.dir"
            )
        return None

    def _resume_from(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        self._health = {
            step: read_health(folder_of(self._root, step)) for step in complete_steps(self._root)
        }

        state = read_train_state(folder)
        self.latest_step = step = int(state["step"])
        if self._health.get(step) is False:
            self._log(
                f"{folder}: {UNHEALTHY_REASON}; going on from it, as such a step changes no weights"
            )

        # the run may have ended before the step that tells the health of this checkpoint
        if self._health.get(step) is None:
            self._awaiting_next_step = step, state.get("finite", True)

        return folder, state

    def _verify_on_all_ranks(self, folder: Path) -> str:
        """Verify a checkpoint. Collective; every rank hashes some of the files.

        Returns:
            The damage that was found; empty if none.

        Raises:
            UserError: on every rank: the checkpoint is of another format, or damaged on some rank
                but not on rank 0.
        """
        damage = fatal = ""
        try:
            store.verify(folder, self._layout.rank, self._layout.world_size)
        except store.DamagedError as error:
            damage = str(error)
        except UserError as error:
            fatal = str(error)

        # ranks raise only after this exchange, so that none is left waiting
        reports = mesh.all_gather_object((damage, fatal, socket.gethostname()), self._layout)
        for _, problem, _ in reports:
            if problem:
                raise UserError(problem)

        first_damage = next(
            ((rank, text, host) for rank, (text, _, host) in enumerate(reports) if text), None
        )
        if first_damage is None:
            return ""

        # if rank 0 reads the same files without damage, the fault is in that node's mount
        rank, text, host = first_damage
        if not mesh.broadcast_object(self._layout.rank == 0 and _is_damaged(folder), self._layout):
            raise UserError(
                f"rank {rank} on {host}: {text}; rank 0 finds it intact: "
                "check how that node mounts run.dir"
            )

        return str(text)

    def _quarantine(self, folder: Path, why: str, text: str) -> None:
        """Rename a checkpoint so that it is not found again. Collective."""
        problem = where = ""
        if self._layout.rank == 0:
            try:
                where = str(store.quarantine(folder, why))
            except OSError as error:
                problem = f"{folder} could not be renamed: {os_error_message(error)}"

        problem = mesh.broadcast_object(problem, self._layout)
        if problem:
            raise UserError(problem)
        self._log(f"{text}; it is now {where}; going on from an older one")

    @property
    def time_based_save_due(self) -> bool:
        """True if a save by ``every_minutes`` is due, according to this rank's clock."""
        every = 60 * self._config.every_minutes
        return every > 0 and time.monotonic() - self._last_save_time >= every

    def save(
        self,
        step: int,
        collect_contents: Callable[[], CheckpointContents],
        is_finite: bool,
        wait: bool,
    ) -> None:
        """Finish the previous save and start the next one.

        Args:
            step: the step of the checkpoint.
            collect_contents: returns tensors and state; see :meth:`Saver.start_save`.
            is_finite: whether loss and gradient norm of this step were finite.
            wait: also finish this save, the last one, whose failure is left to the caller to
                report; a save is always finished if saves are not asynchronous.

        Raises:
            SaveError: on every rank, after three failed saves in a row.
        """
        if self.saver.has_pending_save:
            self.finish_save()

        self._last_save_time = time.monotonic()
        self._awaiting_next_step = step, is_finite

        # collecting is part of the time for which training stalls
        start_time = time.perf_counter()
        tensors, state = collect_contents()
        self._tolerating_save_errors(
            lambda: self.saver.start_save(
                step, tensors, {**state, "finite": is_finite}, start_time
            ),
            is_last=wait,
        )

        if self.saver.has_pending_save and (wait or not self._config.asynchronous):
            self.finish_save(is_last=wait)

    def finish_save(self, is_last: bool = False) -> None:
        """Wait for the pending save and complete it.

        Args:
            is_last: see ``wait`` of :meth:`save`.

        Raises:
            SaveError: see :meth:`save`.
        """

        def finish() -> None:
            """Complete the checkpoint and report it."""
            saved = self.saver.finish_save()
            self.latest_step = saved.step
            self._num_failed_saves = 0
            self._health[saved.step] = None
            self.on_saved(saved)

        # poll, as a slow disk may exceed the timeout of a single collective
        while self._layout.world_size > 1 and int(
            mesh.all_reduce_max(torch.tensor(int(self.saver.is_writing), device=mesh.device()))
        ):
            time.sleep(POLL_SECONDS)

        self._tolerating_save_errors(finish, is_last)
        self._apply_pending_health()

    def _tolerating_save_errors(self, action: Callable[[], None], is_last: bool) -> None:
        """Tolerate transient save failures; give up after three in a row."""
        try:
            action()
        except SaveError as error:
            self._num_failed_saves += 1
            self._awaiting_next_step = self._pending_health = None

            since = "the beginning" if self.latest_step is None else f"step {self.latest_step}"
            self.last_failure = f"{error}; then the same command goes on from {since}"
            if self._num_failed_saves == MAX_FAILED_SAVES:
                raise SaveError(self.last_failure) from error
            if not is_last:
                self._log(
                    f"{error}; training goes on; {MAX_FAILED_SAVES} failed saves in a row end the "
                    f"run, this was number {self._num_failed_saves}"
                )

    def record_step_health(self, step: int, is_finite: bool) -> None:
        """Record whether a step was finite.

        The checkpoint of the step before it is healthy if both steps were finite.
        """
        if self._awaiting_next_step is not None and self._awaiting_next_step[0] == step - 1:
            self._pending_health = step - 1, self._awaiting_next_step[1] and is_finite
            self._awaiting_next_step = None
            self._apply_pending_health()

    def _apply_pending_health(self) -> None:
        """Write the health of a completed checkpoint, and delete those no longer kept."""
        if self._pending_health is None or self.saver.has_pending_save:
            return

        step, healthy = self._pending_health
        self._pending_health = None
        if self._layout.rank == 0 and step in self._health:
            self._health[step] = healthy
            try:
                store.write_health(folder_of(self._root, step), healthy)
                retention.prune(
                    self._root, self._health, self._config.keep, self._config.keep_every_steps
                )
            except OSError as error:
                self._log(f"an old checkpoint could not be deleted: {os_error_message(error)}")

    def _log(self, text: str) -> None:
        if self._layout.rank == 0:
            log_to_stderr(text)


def _is_damaged(folder: Path) -> bool:
    try:
        store.verify(folder)
    except store.DamagedError:
        return True
    return False
