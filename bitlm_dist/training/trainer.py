"""The training loop: steps, metrics, evaluations, checkpoints, and the end of a run."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from typing_extensions import override

from bitlm_dist.checkpoint.steps import complete_steps
from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.data.mixture_dataset import MixtureDataset, training_dataset
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.data.vocabulary import make_codes
from bitlm_dist.data_prep.tokenizer import TOKENIZER_DIR, Tokenizer
from bitlm_dist.errors import UserError
from bitlm_dist.launch.attempts import stop_files
from bitlm_dist.model.build import prepare_device
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import SINGLE_PROCESS, ParallelLayout, resolve_micro_batch_size
from bitlm_dist.training.agreement import Agreement, Flags
from bitlm_dist.training.batches import Batches
from bitlm_dist.training.checkpoint_folder import CHECKPOINTS
from bitlm_dist.training.display import NoDisplay, TrainingDisplay
from bitlm_dist.training.divergence import DivergenceMonitor
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.periodic_evaluation import (
    Evaluator,
    PeriodicEvaluation,
    check_evaluation_layout,
)
from bitlm_dist.training.reporter import Reporter
from bitlm_dist.training.run_checkpoints import RunCheckpoints
from bitlm_dist.training.run_claim import check_inputs, check_run
from bitlm_dist.training.run_folder import RunFolder
from bitlm_dist.training.sharded_head import check_head_engine
from bitlm_dist.training.step_metrics import step_metrics
from bitlm_dist.training.step_pipeline import StepPipeline, StepReport
from bitlm_dist.training.stop_signals import StopMonitor, stop_reason
from bitlm_dist.training.teacher import Teacher
from bitlm_dist.training.train_state import TrainState

Hook = Callable[[Mapping[str, Any]], None]


class Trainer(AbstractContextManager["Trainer"]):
    """Trains a model from step 0, or from the run's latest checkpoint, to ``training.steps``.

    ``with Trainer.build(config).open() as trainer: trainer.fit()`` is a whole run. Collective: all
    ranks must build one and call its methods in the same order.

    Attributes:
        state: what the run has done up to the last step that is complete.
        stopped_by: why :meth:`fit` ended early: a signal's name or the stop file; None if it did
            not.
    """

    def __init__(
        self,
        config: Config,
        codes: BitCodes,
        engine: Engine,
        dataset: PackedDataset | MixtureDataset,
        teacher: Teacher | None,
        attention_backend: str,
    ) -> None:
        self.config = config
        self.attention_backend = attention_backend
        self.engine = engine
        self.layout = engine.layout
        self.device = mesh.device()
        self.sequences_per_step = config.training.global_batch_tokens // config.data.sequence_length
        self._codes = codes
        self._teacher = teacher

        # The run, on disk and on the screen.
        self.state = TrainState()
        self.folder = RunFolder(config.run.dir)
        self._reporter = Reporter(config, self.layout)
        self._divergence = DivergenceMonitor(self.folder)
        self.checkpoints = RunCheckpoints(
            config, engine, dataset, self.folder, self._divergence, self._reporter
        )

        # What happens in a step, and after it.
        self._batches: Batches  # from open() to close()
        self._agreement = Agreement(self._local_flags, self.layout)
        self._pipeline = StepPipeline(engine, self._agreement)
        self._hooks: list[tuple[Hook, int]] = []
        self.evaluations = PeriodicEvaluation(config, engine, self._reporter)
        self._evaluate: Evaluator | None = None

        # What all ranks agreed on.
        self._stop_monitor = self._make_stop_monitor()
        self._is_save_due = False  # by time
        self.stopped_by: str | None = None

    @classmethod
    def build(cls, config: Config, layout: ParallelLayout = SINGLE_PROCESS) -> "Trainer":
        """Build all parts. Opens the data, whose cache is all that may change on disk.

        Args:
            config: A validated config.
            layout: The job's parallel layout.

        Raises:
            UserError: Data, teacher, layout and config do not fit together.
        """
        check_inputs(config)
        assert config.data.path is not None
        attention_backend = prepare_device(config)
        resolve_micro_batch_size(config, layout)
        check_head_engine(config, layout)
        check_evaluation_layout(config, layout)

        manifest = read_manifest(config.data.path)
        codes = make_codes(config.model, config.data.path, manifest)
        teacher = Teacher.from_config(config, manifest["tokenizer"]["fingerprint"], layout)
        dataset = training_dataset(config)
        byte_lengths = Tokenizer.from_folder(config.data.path / TOKENIZER_DIR).byte_lengths

        # Rank 0 decides: a network file system may show stale contents to other ranks.
        mesh.init_process_groups(layout)
        found = complete_steps(config.run.dir / CHECKPOINTS) if layout.rank == 0 else []
        steps = mesh.broadcast_object(found, layout)
        engine = Engine(
            config,
            codes,
            manifest["eos"],
            layout,
            byte_lengths,
            manifest["bos"],
            initialize=not steps,
        )
        return cls(config, codes, engine, dataset, teacher, attention_backend)

    def open(self, resume: bool = True) -> "Trainer":
        """Lock the run folder and load the latest checkpoint; :meth:`close` releases both.

        Args:
            resume: Resume from the latest checkpoint, if any. If False, raise when one exists.

        Returns:
            This trainer, a context manager that closes itself.

        Raises:
            UserError: Run folder, checkpoint, data and config do not fit together. Nothing on disk
                was changed, except that ``checkpoint.fallback`` renames damaged checkpoints.
        """
        assert self.config.data.path is not None
        is_rank_zero = self.layout.rank == 0
        check_run(self.config, self.layout.rank, resume)
        if is_rank_zero:
            self.folder.acquire(self.config, self.config.data.path / TOKENIZER_DIR, self._codes)

        try:
            self._load_latest()
            if is_rank_zero and self.step < self.config.training.steps:
                self.checkpoints.check_space()
            self._batches = Batches(
                self.config, self.layout, self.dataset, self.engine, self._teacher, self.state
            )
        except BaseException:
            self.folder.release()
            raise
        return self

    def _load_latest(self) -> None:
        """Load the latest checkpoint, if there is one. Collective."""
        # Every rank reads the checkpoint, so all must see the folder that rank 0 has locked.
        self.folder.check_shared_by_all_ranks(self.layout)
        saved = self.checkpoints.load_latest()
        if saved is None:
            if not self.engine.is_initialized:
                raise UserError(
                    f"{self.folder.checkpoints}: the checkpoints were removed while the run "
                    "started: start it again"
                )
            return

        self.state = TrainState.from_checkpoint(saved)
        self._divergence.is_finite = saved.get("finite", True)
        # Rank 0 decides: a network file system may show stale contents to other ranks.
        self.evaluations.last_step = mesh.broadcast_object(
            self.folder.last_evaluation(self.state.step), self.layout
        )
        # Older checkpoints do not count failures.
        self.evaluations.num_failures = saved.get("evaluation_failures", 0)

    def close(self) -> None:
        """Release the data and the run folder."""
        self._batches.close()
        self.folder.release()

    @override
    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def step(self) -> int:
        """Steps taken, including the one that the device still works on."""
        return self.state.step + len(self._pipeline)

    @property
    def dataset(self) -> PackedDataset | MixtureDataset:
        """The training data."""
        return self.checkpoints.dataset

    @property
    def is_done(self) -> bool:
        """True if all steps were taken and no evaluation is due."""
        return self.step >= self.config.training.steps and not self.evaluations.is_due(self.step)

    def add_hook(self, hook: Hook, every: int = 1) -> None:
        """Have ``hook`` called with the metrics of every n-th step, once that step is complete."""
        self._hooks.append((hook, every))

    def fit(
        self,
        until: int | None = None,
        evaluate: Evaluator | None = None,
        display: TrainingDisplay | None = None,
    ) -> None:
        """Train to step ``until``; save when due, at the end, and when a stop is requested.

        Args:
            until: The last step to take; default: the end of the run.
            evaluate: Called with the model when ``evaluation.every_steps`` says so; its result
                goes to evaluations.jsonl. It must not communicate with other ranks.
            display: Told of saves and evaluations.

        Raises:
            UserError: A checkpoint cannot be written, the data are damaged, or three evaluations
                in a row failed.
            DivergedError: The loss or gradient norm was not finite in too many steps in a row, or
                the run is at its end, and the last loss or gradient norm or a weight is not finite.
        """
        self._evaluate = evaluate
        last_step = min(until or self.config.training.steps, self.config.training.steps)
        with self._listening_and_logging(display or NoDisplay()):
            self._evaluate_if_due()  # one that a stop interrupted before
            self._act_on(self._agreement.now())

            while self.step < last_step and not self.stopped_by and self._launch_step():
                # The host deals with the step before, while the device works on the new one.
                self._complete_steps(num_left=1)
                if self._is_pause_due():
                    self._pause(is_last=self.step == last_step)

            self._complete_steps()
            # A stop may have been requested during the last evaluation.
            self._act_on(self._agreement.now())
            self._complete_checkpoint()
            self.raise_if_diverged()

    @contextmanager
    def _listening_and_logging(self, display: TrainingDisplay) -> Iterator[None]:
        """Listen for requests to stop and keep the log, while training lasts."""
        with (
            self._make_stop_monitor() as self._stop_monitor,
            self._reporter.reporting(self.folder, self.step, display),
        ):
            try:
                yield
            except Exception:
                # While a job is shut down, collectives fail because peers are gone. That is no
                # failure of this rank, so it dies by the signal instead of reporting it.
                if self.layout.world_size > 1:
                    self._stop_monitor.die_by_signal()
                raise

    def _make_stop_monitor(self) -> StopMonitor:
        return StopMonitor([self.folder.stop_file, *stop_files(os.environ)], self.layout.rank)

    def _launch_step(self) -> bool:
        """Launch the next step.

        Returns:
            False if a stop was requested while waiting for its batch.
        """
        try:
            batch = self._batches.next(self.step, self._stop_monitor)
            if batch is not None:
                self._pipeline.launch(batch, self.step)
        except Exception:
            # What was done before is on record. The ranks may not agree on anything any more.
            while self._pipeline:
                self._complete_step()
            raise
        return batch is not None

    def _complete_steps(self, num_left: int = 0) -> None:
        """Wait for launched steps, all but the last ``num_left``, and act on their reports."""
        while len(self._pipeline) > num_left:
            report = self._complete_step()
            self._act_on(self._agreement.result(report.values["flags"]))

    def _complete_step(self) -> StepReport:
        """Wait for the oldest launched step, and record what it reports."""
        report = self._pipeline.read()
        sequence_length = self.config.data.sequence_length
        self.state = self.state.after(report, self.sequences_per_step, sequence_length)
        self.checkpoints.manager.record_step_health(self.state.step, report.is_finite)
        self._divergence.record_step(self.state.step, report.is_finite)

        metrics = step_metrics(
            self.config,
            report,
            self.state,
            self.dataset,
            self.evaluations.num_failures,
            self._divergence.has_finite_weights,
        )
        self._reporter.log.write(metrics)
        for hook, every in self._hooks:
            if self.state.step % every == 0:
                hook(metrics)
        return report

    def _local_flags(self) -> Flags:
        manager = self.checkpoints.manager
        is_save_due = manager.time_based_save_due and self.layout.rank == 0
        return Flags(self._stop_monitor.code, int(manager.saver.is_writing), int(is_save_due))

    def _act_on(self, flags: Flags) -> None:
        """Note what the ranks agreed on, and complete a pending save that all have written."""
        self.stopped_by = stop_reason(flags.stop)
        self._is_save_due = bool(flags.is_save_due)
        manager = self.checkpoints.manager
        if manager.saver.has_pending_save and not flags.is_writing:
            manager.finish_save()

    def _is_pause_due(self) -> bool:
        is_evaluation_due = self._evaluate is not None and self.evaluations.is_due(self.step)
        return is_evaluation_due or self._is_save_due or self.checkpoints.is_due(self.step)

    def _pause(self, is_last: bool) -> None:
        """Let the device finish, evaluate and save what is due, and agree with the other ranks."""
        self._complete_steps()
        self._evaluate_if_due()
        if self._is_save_due or self.checkpoints.is_due(self.step):
            self.checkpoints.save(self.state, self.evaluations.num_failures, wait=is_last)
        self._act_on(self._agreement.now())

    def _evaluate_if_due(self) -> None:
        """Evaluate if due. An evaluation that a stop request interrupts is left to the resumed run.

        Raises:
            UserError: The third evaluation in a row failed. A checkpoint was saved.
        """
        if self._evaluate is None or not self.evaluations.is_due(self.step):
            return

        self.evaluations.evaluate(self.state, self._evaluate, self._stop_monitor)
        if self.evaluations.has_given_up:
            # Save first, so that no step is lost while the user fixes the evaluation.
            self._complete_checkpoint()
            raise self.evaluations.repeated_failure_error(self.step)

    def _complete_checkpoint(self) -> None:
        """Complete a checkpoint of the current step, and with it a request to stop."""
        self.checkpoints.complete(self.state, self.evaluations.num_failures)
        # Left behind, the file would look like a new request.
        if self.stopped_by and self.layout.rank == 0:
            self.folder.stop_file.unlink(missing_ok=True)

    def raise_if_diverged(self) -> None:
        """Raise if the run is at its end and its model is unusable; no-op before the end.

        Raises:
            DivergedError: The last loss or gradient norm, or a weight, is not finite.
        """
        if self.step >= self.config.training.steps:
            self._divergence.raise_if_diverged(self.step)
