"""Evaluations during training: when one is due, and how the run reacts to a failed one."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from bitlm_dist.config import Config
from bitlm_dist.errors import UserError, log_to_stderr, log_traceback
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.training.display import EVALUATING
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.reporter import Reporter
from bitlm_dist.training.sample_text import SampleText
from bitlm_dist.training.stop_signals import StopMonitor, StopRequested
from bitlm_dist.training.train_state import TrainState

MAX_CONSECUTIVE_FAILURES = 3  # in a row
Evaluator = Callable[[LanguageModel], Mapping[str, Any]]
T = TypeVar("T")


def check_evaluation_layout(config: Config, layout: ParallelLayout) -> None:
    """Check that every rank holds a whole model, if there are evaluations.

    Raises:
        UserError: It does not.
    """
    if config.evaluation.every_steps and layout.model_parallel_size > 1:
        raise UserError(
            f"evaluation.every_steps = {config.evaluation.every_steps} needs the whole model in "
            "one process: use 0 and `bitlm eval` on the checkpoints"
        )


class PeriodicEvaluation:
    """Collective: all ranks must construct one and call its methods in the same order.

    Args:
        config: The run's config; ``evaluation.every_steps`` and ``training.steps`` say when.
        engine: Holds the model.
        reporter: Told of scores and sample texts.

    Attributes:
        last_step: The last step that was evaluated, successfully or not.
        num_failures: Number of failed evaluations of the run.
    """

    def __init__(self, config: Config, engine: Engine, reporter: Reporter) -> None:
        self._every_steps = config.evaluation.every_steps
        self._num_steps = config.training.steps
        self._has_samples = config.evaluation.num_samples > 0 and engine.layout.rank == 0
        self._sample_text = SampleText(config)
        self._engine = engine
        self._layout = engine.layout
        self._reporter = reporter
        self._num_consecutive_failures = 0
        self.last_step = 0
        self.num_failures = 0

    def is_due(self, step: int) -> bool:
        """True if the model after ``step`` steps is to be evaluated and has not been."""
        return (
            self._every_steps > 0
            and (step % self._every_steps == 0 or step == self._num_steps)
            and step > self.last_step
        )

    @property
    def has_given_up(self) -> bool:
        """True once the last three evaluations have failed."""
        return self._num_consecutive_failures >= MAX_CONSECUTIVE_FAILURES

    def evaluate(self, state: TrainState, evaluate: Evaluator, stop_monitor: StopMonitor) -> None:
        """Evaluate the model, have it write sample texts, and report both.

        Args:
            state: The state of the run.
            evaluate: Returns the report of a model; see :meth:`_run` on what it must not do.
            stop_monitor: A request to stop interrupts the evaluation.
        """

        def score() -> tuple[Mapping[str, Any], list[dict[str, str]]]:
            """The report and the texts."""
            with self._engine.full_model_in_eval_mode() as model, stop_monitor.interruptible():
                report = evaluate(model)
                return report, self._sample_text.write(model) if self._has_samples else []

        with self._reporter.display.phase(EVALUATING):
            scored = self._run(state.step, score)
        if scored is None:
            return

        report, samples = scored
        self._reporter.log.write_evaluation(state.progress(), report)
        if samples:
            self._reporter.log.write_samples(state.progress(), samples)
        self._reporter.display.show_evaluation(state.step, report, samples)

    def _run(self, step: int, score: Callable[[], T]) -> T | None:
        """Evaluate. A failure on any rank counts as a failure on all; its traceback is printed.

        ``score`` must not communicate after its first operation that can fail: a rank that leaves
        a collective in which others still wait cannot be recovered, and takes the job down.

        Args:
            step: Steps taken so far.
            score: Returns the scores.

        Returns:
            The scores; None if the evaluation failed, or was interrupted by a stop on some rank.
            After a stop the step stays due, so that the resumed run evaluates it.
        """
        scores: T | None = None
        failed = stopped = False
        try:
            scores = score()
        except StopRequested:
            stopped = True
        except Exception as error:
            failed = True
            log_traceback(error)
            log_to_stderr(
                f"the evaluation of step {step} failed on rank {self._layout.rank}: "
                f"{_one_line(error)}"
            )

        # All ranks must count the same failures, or they would give up at different steps.
        failed, stopped = self._any_rank(failed, stopped)
        if stopped:
            return None

        self.last_step = step
        self._num_consecutive_failures = self._num_consecutive_failures + 1 if failed else 0
        if not failed:
            return scores

        self.num_failures += 1
        if self._layout.rank == 0 and not self.has_given_up:
            log_to_stderr(
                f"training goes on; {MAX_CONSECUTIVE_FAILURES} failures in a row end the run, "
                f"this was number {self._num_consecutive_failures}"
            )
        return None

    def _any_rank(self, *happened: bool) -> tuple[bool, ...]:
        """For each flag, True if it is set on any rank. Collective."""
        if self._layout.world_size == 1:
            return happened

        flags = torch.tensor([int(flag) for flag in happened], device=mesh.device())
        return tuple(bool(flag) for flag in mesh.all_reduce_max(flags).tolist())

    def repeated_failure_error(self, step: int) -> UserError:
        """The error that ends a run whose evaluations keep failing, saved at ``step``."""
        return UserError(
            f"{MAX_CONSECUTIVE_FAILURES} evaluations in a row failed, the last at step {step}, "
            "for which a checkpoint was saved: fix the errors in the tracebacks above, or set "
            "evaluation.every_steps = 0; the same command goes on from there"
        )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
