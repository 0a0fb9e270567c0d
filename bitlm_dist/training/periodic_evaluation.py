"""Evaluations while a run trains: when one is due, and what a failed one does to the run."""

import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bitlm_dist.config import Config
from bitlm_dist.errors import UserError, say
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.training.stopping import Interrupted

MAX_FAILED = 3  # in a row


class PeriodicEvaluation:
    """Collective: all ranks must construct one and call its methods in the same order.

    Args:
        config: ``evaluation.every_steps`` and ``training.steps`` say when.
        layout: of the job.

    Attributes:
        last: the last step that was evaluated, whether with success or not.
        failures: failed evaluations of the run.
    """

    def __init__(self, config: Config, layout: Layout) -> None:
        self._every, self._steps, self._layout = config.evaluation.every_steps, config.training.steps, layout
        self._failed_in_a_row = 0
        self.last = 0
        self.failures = 0

    def due(self, step: int) -> bool:
        """True if the model after ``step`` steps is to be evaluated and has not been."""
        return self._every > 0 and (step % self._every == 0 or step == self._steps) and step > self.last

    @property
    def given_up(self) -> bool:
        """True once the last three evaluations have failed."""
        return self._failed_in_a_row >= MAX_FAILED

    def run(self, step: int, score: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Evaluate; a failure on any rank is a failure on all, and is reported with its traceback.

        ``score`` must not communicate after the first operation of it that can fail: a rank that leaves a collective that others
        still wait in cannot be brought back, and ends with the job.

        Args:
            step: steps taken so far.
            score: returns the report.

        Returns:
            The report; None if the evaluation failed, or if a request to stop broke in on some rank. After a stop the step stays
            due, so that the resumed run evaluates it.
        """
        report: Mapping[str, Any] | None = None
        failed = stopped = False
        try:
            report = score()
        except Interrupted:
            stopped = True
        except Exception as error:
            failed = True
            traceback.print_exception(error)
            say(f"the evaluation of step {step} failed on rank {self._layout.rank}: {_one_line(error)}")

        failed, stopped = self._anywhere(failed, stopped)
        if stopped:
            return None

        self.last = step
        self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
        if not failed:
            return report

        self.failures += 1
        if self._layout.rank == 0 and not self.given_up:
            say(f"training goes on; {MAX_FAILED} failures in a row end the run, this was number {self._failed_in_a_row}")
        return None

    def _anywhere(self, *happened: bool) -> tuple[bool, ...]:
        """Which of these happened on any rank."""
        if self._layout.world == 1:
            return happened
        flags = torch.tensor([int(flag) for flag in happened], device=mesh.device())
        return tuple(bool(flag) for flag in mesh.most_of_all(flags).tolist())

    def error(self, step: int) -> UserError:
        """What ends a run whose evaluations keep failing, once it is saved at ``step``."""
        return UserError(
            f"{MAX_FAILED} evaluations in a row failed, the last at step {step}, for which a checkpoint was saved: mend what the "
            "tracebacks above name, or set evaluation.every_steps = 0; the same command goes on from there"
        )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
