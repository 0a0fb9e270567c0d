"""The training loop: steps, metrics, evaluations, checkpoints, and the end of a run."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from bitlm_dist.checkpoint.saver import SaveStats
from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.config_loading import with_absolute_paths
from bitlm_dist.data.loader import Loader
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.data.mixture_dataset import MixtureDataset, training_dataset
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.data.vocabulary import make_codes
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.errors import UserError
from bitlm_dist.launch.attempts import stop_files
from bitlm_dist.model.build import prepare_device
from bitlm_dist.model.language_model import Batch, LanguageModel
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import SINGLE_PROCESS, ParallelLayout, resolve_micro_batch_size
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.training.checkpoint_folder import checkpoint_steps
from bitlm_dist.training.checkpointing import CheckpointManager
from bitlm_dist.training.data_resumption import mixture_state_dict, resume_dataset
from bitlm_dist.training.disk_space import (
    FreeSpaceWatch,
    check_disk_space,
    estimate_checkpoint_bytes,
)
from bitlm_dist.training.display import EVALUATING, SAVING, NoDisplay, TrainingDisplay
from bitlm_dist.training.divergence import DivergenceMonitor
from bitlm_dist.training.engine import Engine, StepResult
from bitlm_dist.training.memory_advice import out_of_memory_advice
from bitlm_dist.training.metrics import MetricsLog, NullMetricsLog
from bitlm_dist.training.optimizer import learning_rates
from bitlm_dist.training.periodic_evaluation import PeriodicEvaluation
from bitlm_dist.training.resource_usage import memory_usage
from bitlm_dist.training.run_claim import GLOBAL_BATCH_KEY, check_start
from bitlm_dist.training.run_folder import RunFolder, environment
from bitlm_dist.training.sample_text import SampleText
from bitlm_dist.training.sharded_head import check_head_engine
from bitlm_dist.training.stop_signals import STOP_SIGNALS, StopMonitor, StopRequested, stop_reason
from bitlm_dist.training.teacher import Teacher
from bitlm_dist.training.weights import (
    checkpoint_shards,
    checkpoint_slot_name,
    checkpoint_weight_name,
    load_job_shards,
)

Observer = Callable[[Mapping[str, Any]], None]
Evaluator = Callable[[LanguageModel], Mapping[str, Any]]


class Trainer:
    """Trains a model from step 0, or from the run's latest checkpoint, to ``training.steps``.

    Collective: all ranks must construct one and call its methods in the same order.

    Args:
        config: A validated config.
        resume: Resume from the latest checkpoint, if any. If False, raise when one exists.
        layout: The job's parallel layout.

    Raises:
        UserError: The data, run folder, checkpoint, layout or config do not fit together. Nothing
            on disk was changed, except that ``checkpoint.fallback`` renames damaged checkpoints.
    """

    def __init__(
        self, config: Config, resume: bool = True, layout: ParallelLayout = SINGLE_PROCESS
    ) -> None:
        self.config = config
        self.layout = layout
        check_start(config, layout.rank, resume)
        assert config.data.path is not None

        self.attention_backend = prepare_device(config)
        _check_supported(config, layout)

        manifest = read_manifest(config.data.path)
        codes = make_codes(config.model, config.data.path, manifest)
        self._teacher = Teacher.from_config(config, manifest["tokenizer"]["fingerprint"], layout)
        self.folder = RunFolder(config.run.dir)
        self.dataset = self._open_dataset()
        if layout.rank == 0:
            self.folder.acquire(config, config.data.path / "tokenizer", codes)

        try:
            self._set_up(codes, manifest)
        except BaseException:
            self.folder.release()
            raise

    def _set_up(self, codes: BitCodes, manifest: Mapping[str, Any]) -> None:
        """Build the engine and load the latest checkpoint."""
        config = self.config
        layout = self.layout
        assert config.data.path is not None

        self.device = mesh.device()
        byte_lengths = Tokenizer.from_folder(config.data.path / "tokenizer").byte_lengths
        self.engine = Engine(config, codes, manifest["eos"], layout, byte_lengths, manifest["bos"])
        self._identity = self._describe_run()

        # Progress of the run, accumulated over all restarts.
        self.sequences_per_step = config.training.global_batch_tokens // config.data.sequence_length
        self.step = 0
        self.num_tokens = 0
        self._next_sequence = 0  # global index of the next sequence to be read
        # None if the run was started by a version that did not count them.
        self.num_predicted_tokens: int | None = 0
        self.num_text_bytes: int | None = 0
        self.seconds = 0.0  # wall time spent in steps
        self.cpu_seconds = 0.0

        self._num_steps_taken = 0  # by this process
        self._data_wait_seconds = 0.0  # for the batch of the current step
        self._divergence_monitor = DivergenceMonitor(self.folder)
        self.evaluations = PeriodicEvaluation(config, layout)
        self._sample_text = SampleText(config)
        self._display: TrainingDisplay = NoDisplay()
        self._flush_log: Callable[[], None] = lambda: None  # set while a log is open
        self._stop_monitor = self._make_stop_monitor()
        self._stopped_by: str | None = None
        self.checkpoint_manager = CheckpointManager(
            self.folder.checkpoints, config.checkpoint, layout
        )

        # Every rank reads the checkpoint, so all must see the folder that rank 0 has locked.
        self.folder.check_shared_by_all_ranks(layout)
        resume_point = self.checkpoint_manager.find_resume_point()
        if resume_point is not None:
            self._load_checkpoint(*resume_point)

        # Metrics of later steps, left by a process that was killed before it saved, are dropped.
        self._resume_step = self.step
        self._space_watch = FreeSpaceWatch(self.folder.checkpoints, config.checkpoint)
        if layout.rank == 0 and self.step < config.training.steps:
            self._check_disk_space()
        self._unwritten_codes: BitCodes | None = codes
        self._loader = self._make_loader()

    def _open_dataset(self) -> PackedDataset | MixtureDataset:
        """Open the training data, positioned at their beginning.

        Raises:
            UserError: A new run would take more epochs over a source than the config allows.
        """
        dataset = training_dataset(self.config)
        # A resumed run is checked in resume_dataset, from its checkpoint's position on.
        if not checkpoint_steps(self.config.run.dir):
            dataset.check_source_limits(self.config.training.steps)
        return dataset

    def _describe_run(self) -> dict[str, Any]:
        """The data's fingerprint, the config and the environment, as stored in checkpoints."""
        return {
            "fingerprint": {
                **self.dataset.fingerprint(),
                GLOBAL_BATCH_KEY: self.config.training.global_batch_tokens,
            },
            "config": with_absolute_paths(self.config).model_dump(mode="json"),
            "environment": environment(),
        }

    def _make_loader(self) -> Loader:
        """A loader of this data rank's part of every global batch, from the current step on."""
        num_local_sequences = self.sequences_per_step // self.layout.data
        return Loader(
            self.config,
            self.dataset,
            start_step=self.step,
            first_sequence=self._next_sequence + self.layout.data_rank * num_local_sequences,
            num_sequences=num_local_sequences,
            stride=self.sequences_per_step,
            device=self.device,
        )

    def fit(
        self,
        until: int | None = None,
        observe: Observer | None = None,
        evaluate: Evaluator | None = None,
        display: TrainingDisplay | None = None,
    ) -> None:
        """Train to step ``until``; save when due, at the end, and when a stop is requested.

        Args:
            until: The last step to take; default: the end of the run.
            observe: Called with every step's metrics.
            evaluate: Called with the model when ``evaluation.every_steps`` says so; its result
                goes to evaluations.jsonl. It must not communicate with other ranks.
            display: Told of saves and evaluations.

        Raises:
            UserError: A checkpoint cannot be written, the data are damaged, or three evaluations
                in a row failed.
            DivergedError: The loss or gradient norm was not finite in too many steps in a row, or
                the run is at its end, and the last loss or gradient norm or a weight is not finite.
        """
        self._display = display or NoDisplay()
        last_step = min(until or self.config.training.steps, self.config.training.steps)
        with self._make_stop_monitor() as self._stop_monitor, self._open_log() as log:
            try:
                self._evaluate_if_due(evaluate, log)  # one that a stop interrupted before
                while self.step < last_step:
                    start_times = time.perf_counter(), time.process_time()
                    batch = self._next_batch()
                    save_due = self._sync_stop_and_save()
                    if batch is None or self._stopped_by:
                        break

                    metrics = self._train_on_batch(batch, *start_times)
                    log.write(metrics)
                    if observe:
                        observe(metrics)

                    self._evaluate_if_due(evaluate, log)
                    if save_due or self._is_due(self.config.checkpoint.every_steps):
                        self._save_checkpoint(wait=self.step == last_step)

                # A stop may have been requested during the last evaluation.
                self._sync_stop_and_save()
                self._final_save()
                self.raise_if_diverged()
            except Exception:
                self._exit_with_launcher_signal()
                raise

    def _make_stop_monitor(self) -> StopMonitor:
        return StopMonitor([self.folder.stop_file, *stop_files(os.environ)], self.layout.rank)

    @contextmanager
    def _open_log(self) -> Iterator[MetricsLog | NullMetricsLog]:
        """Open the metrics log on rank 0, and have completed saves recorded in it."""
        log = (
            MetricsLog(self.folder.path, self.config, self.step)
            if self.layout.rank == 0
            else NullMetricsLog()
        )

        def record_save(saved: SaveStats) -> None:
            """Record a save, and warn while there is time if the next ones may find no room."""
            log.write_save(saved)
            if self.layout.rank == 0 and saved.step < self.config.training.steps:
                self._space_watch.check(saved.bytes)

        self.checkpoint_manager.on_saved = record_save
        self._flush_log = log.flush

        try:
            yield log
        finally:
            log.close()

    def _check_disk_space(self) -> None:
        """Warn if the checkpoints to be kept will not all fit on their disk.

        Raises:
            UserError: Not even the next one fits.
        """
        named = [pair for chunk in self.engine.chunks for pair in chunk.named_parameters()]
        needed = estimate_checkpoint_bytes(self.config, self.engine.num_parameters, named)
        self._space_watch.warn(
            check_disk_space(
                self.config.checkpoint.dir or self.folder.checkpoints,
                needed,
                self.config.checkpoint,
            )
        )

    def _write_metadata_once(self) -> None:
        """Write config, environment and vocabulary with the first step or evaluation.

        A process that ends before either of them leaves no trace. No-op from the second call on.

        Raises:
            UserError: The run folder cannot be written.
        """
        codes = self._unwritten_codes
        self._unwritten_codes = None
        if codes is not None and self.layout.rank == 0:
            assert self.config.data.path is not None
            self.folder.write_metadata(self.config, self.config.data.path / "tokenizer", codes)
            self.folder.drop_metrics_after(self._resume_step)

    def _next_batch(self) -> Batch | None:
        """The next step's batch; None if a stop was requested while waiting for it."""
        start_time = time.perf_counter()
        self._loader.start(self.step)
        try:
            with self._stop_monitor.interruptible():
                self._loader.wait()
        except StopRequested:
            return None
        self._data_wait_seconds = time.perf_counter() - start_time
        return self._loader.get()

    def _sync_stop_and_save(self) -> bool:
        """Agree with all ranks on stopping, and complete a pending save that all have written.

        Collective; called between two steps.

        Returns:
            True if a time-based save is due, according to rank 0's clock.
        """
        is_save_due = self.checkpoint_manager.time_based_save_due and self.layout.rank == 0
        # One all-reduce per step carries all three flags.
        local_flags = torch.tensor(
            [self._stop_monitor.code, self.checkpoint_manager.saver.is_writing, is_save_due],
            device=self.device,
        )
        stop, writing, save = (
            mesh.all_reduce_max(local_flags) if self.layout.world_size > 1 else local_flags
        ).tolist()

        self._stopped_by = stop_reason(stop)
        if self.checkpoint_manager.saver.has_pending_save and not writing:
            self.checkpoint_manager.finish_save()
        return bool(save)

    def _exit_with_launcher_signal(self) -> None:
        """Die by the launcher's signal, if one was received; else return.

        While a job is shut down, collectives fail because peers are gone. That is no failure of
        this rank, so it dies by the signal instead of reporting the exception.
        """
        time.sleep(0)  # lets Python handle a signal that arrived inside torch
        number = self._stop_monitor.code
        if number in STOP_SIGNALS and self.layout.world_size > 1:
            self._stop_monitor.restore_handlers()
            signal.raise_signal(signal.Signals(number))

    @property
    def stopped_by(self) -> str | None:
        """Why :meth:`fit` ended early: a signal's name or the stop file; None if it did not."""
        return self._stopped_by

    @property
    def is_done(self) -> bool:
        """True if all steps were taken and no evaluation is due."""
        return self.step >= self.config.training.steps and not self.evaluations.is_due(self.step)

    def train_step(self) -> dict[str, Any]:
        """Take one optimizer step on the next global batch.

        Returns:
            The step's metrics.
        """
        start_times = time.perf_counter(), time.process_time()
        self._loader.start(self.step)
        return self._train_on_batch(self._loader.get(), *start_times)

    def _train_on_batch(
        self, batch: Batch, start_time: float, cpu_start_time: float
    ) -> dict[str, Any]:
        """Take a step, update the counters, and record whether the step was finite.

        Returns:
            The step's metrics.
        """
        if self._teacher is not None:
            batch = self._teacher.annotate(batch, self.step)
        result = self._run_engine_step(batch)

        self._write_metadata_once()
        self._num_steps_taken += 1
        self.step += 1
        self._next_sequence += self.sequences_per_step
        tokens = self.sequences_per_step * self.config.data.sequence_length
        self.num_tokens += tokens

        # One copy brings all that the host records; fp64 is exact for counts up to 2^53.
        loss, predicted, text = torch.cat(
            [result.loss.double().view(1), result.num_tokens_and_bytes.double()]
        ).tolist()
        # The copy waited for the device to finish the step, so the time is complete.
        seconds = time.perf_counter() - start_time
        self.seconds += seconds
        self.cpu_seconds += time.process_time() - cpu_start_time
        if self.num_predicted_tokens is not None and self.num_text_bytes is not None:
            self.num_predicted_tokens += int(predicted)
            self.num_text_bytes += int(text)

        grad_norm = float(result.grad_norm)
        is_finite = isfinite(loss) and isfinite(grad_norm)
        self.checkpoint_manager.record_step_health(self.step, is_finite)
        self._divergence_monitor.record_step(self.step, is_finite)

        return {
            **self._progress(),
            "time": time.time(),
            "sequences": self._next_sequence,
            "loss": loss,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens / seconds,
            "predicted_tokens_per_second": predicted / seconds,
            "data_wait_seconds": self._data_wait_seconds,
            **learning_rates(self.config.optimizer, result.lr_multiplier),
            **(memory_usage(self.device) if self.layout.rank == 0 else {}),
            "lr_factor": result.lr_multiplier,
            "skipped": int(not result.applied),
            "evaluation_failures": self.evaluations.num_failures,
            "weights_finite": self._divergence_monitor.has_finite_weights,
            **(self._data_progress() if self.layout.rank == 0 else {}),
        }

    def _run_engine_step(self, batch: Batch) -> StepResult:
        """Run one optimizer step, and turn an out-of-memory error into advice.

        Raises:
            UserError: The device is out of memory in this process's first step.
            RuntimeError: The device is out of memory in a later step.
        """
        try:
            return self.engine.train_step(batch, self.step)
        except torch.OutOfMemoryError as error:
            advice = out_of_memory_advice(
                self.config, self.layout, self.engine.micro_batch_size, error
            )
            # If not even the first step fits, a restart cannot help: only another config can.
            if self._num_steps_taken == 0:
                raise UserError(advice) from error
            raise RuntimeError(advice) from error

    def _data_progress(self) -> dict[str, float]:
        """Sequences and epochs read from each source so far."""
        return {
            **self.dataset.sequences_per_source(self.step),
            **self.dataset.epochs(self.step, self._next_sequence),
        }

    def epochs_at_end(self) -> dict[str, float]:
        """Epochs over each source at the end of the run, see :meth:`PackedDataset.epochs`."""
        steps = self.config.training.steps
        return self.dataset.epochs(
            steps, self._next_sequence + (steps - self.step) * self.sequences_per_step
        )

    def _progress(self) -> dict[str, Any]:
        """Counters of the run; ``tokens`` are all positions, including BOS blocks and padding."""
        return {
            "step": self.step,
            "tokens": self.num_tokens,
            "predicted_tokens": self.num_predicted_tokens,
            "text_bytes": self.num_text_bytes,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluate_if_due(
        self, evaluate: Evaluator | None, log: MetricsLog | NullMetricsLog
    ) -> None:
        """Evaluate if due. An evaluation that a stop request interrupts is left to the resumed run.

        Raises:
            UserError: The third evaluation in a row failed. A checkpoint was saved.
        """
        if evaluate is None or not self.evaluations.is_due(self.step):
            return

        samples: list[dict[str, str]] = []

        def score() -> Mapping[str, Any]:
            with self.engine.full_model_in_eval_mode() as model, self._stop_monitor.interruptible():
                report = evaluate(model)
                if self.config.evaluation.num_samples and self.layout.rank == 0:
                    samples.extend(self._sample_text.write(model))
                return report

        with self._display.phase(EVALUATING):
            report = self.evaluations.run(self.step, score)

        if report is not None:
            self._write_metadata_once()
            log.write_evaluation(self._progress(), report)
            if samples:
                log.write_samples(self._progress(), samples)
            self._display.show_evaluation(self.step, report, samples)
        elif self.evaluations.has_given_up:
            # Save first, so that no step is lost while the user fixes the evaluation.
            self._final_save()
            raise self.evaluations.repeated_failure_error(self.step)

    def raise_if_diverged(self) -> None:
        """Raise if the run is at its end and its model is unusable; no-op before the end.

        Raises:
            DivergedError: The last loss or gradient norm, or a weight, is not finite.
        """
        if self.step >= self.config.training.steps:
            self._divergence_monitor.raise_if_diverged(self.step)

    def _save_checkpoint(self, wait: bool) -> None:
        if self.step == self.config.training.steps:
            self._divergence_monitor.check_weights(self.engine, self.layout)

        # A resumed run never rewrites TensorBoard events up to this step, so they must be on disk.
        self._flush_log()
        with self._display.phase(SAVING):
            self.checkpoint_manager.save(
                self.step, self._checkpoint_contents, self._divergence_monitor.is_finite, wait
            )

    def _checkpoint_contents(self) -> tuple[dict[str, ShardedTensor], dict[str, Any]]:
        """The tensors and the state of a checkpoint of the current step."""
        state = {
            **self._progress(),
            "next_sequence": self._next_sequence,
            "evaluation_failures": self.evaluations.num_failures,
            "mixture": mixture_state_dict(
                self.dataset, self.sequences_per_step, self.step, self._next_sequence
            ),
            **self._identity,
        }
        return self._by_checkpoint_name(
            self.engine.model_state_dict(), self.engine.optimizer_state_dict()
        ), state

    def _final_save(self) -> None:
        """Complete a checkpoint of the current step before the run ends or pauses.

        No-op for step 0, or if the checkpoint exists.

        Raises:
            UserError: It could not be written.
        """
        if self.checkpoint_manager.saver.has_pending_save:
            with self._display.phase(SAVING):
                self.checkpoint_manager.finish_save()

        if self.step > 0 and self.checkpoint_manager.latest_step != self.step:
            self._save_checkpoint(wait=True)
            # A single failed save is tolerated in training, but not here.
            if self.checkpoint_manager.latest_step != self.step:
                raise UserError(
                    f"the checkpoint of the last step, {self.step}, could not be written: "
                    f"{self.checkpoint_manager.last_failure}"
                )

        # The request is fulfilled; left behind, the file would look like a new one.
        if self._stopped_by and self.layout.rank == 0:
            self.folder.stop_file.unlink(missing_ok=True)

    def _by_checkpoint_name(
        self, weights: Mapping[str, ShardedTensor], optimizer_state: Mapping[str, ShardedTensor]
    ) -> dict[str, ShardedTensor]:
        """Weights and optimizer state by their names in a checkpoint."""
        tensors = {checkpoint_weight_name(name): tensor for name, tensor in weights.items()}
        for name, tensor in optimizer_state.items():
            parameter, _, slot = name.rpartition(".")
            tensors |= {
                checkpoint_slot_name(n, slot): t
                for n, t in checkpoint_shards(parameter, tensor, self.layout).items()
            }
        return tensors

    def _load_checkpoint(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        """Restore data position, weights, optimizer state and counters from a checkpoint.

        Raises:
            UserError: Training cannot continue from this checkpoint.
        """
        if state.get("weights_only"):
            raise UserError(
                f"{checkpoint} was imported and holds weights alone: "
                "it can be evaluated and generated from, but not trained"
            )
        if state.get("weights_finite") is False and state["step"] < self.config.training.steps:
            raise UserError(
                f"{checkpoint} holds weights that are not finite: "
                "set checkpoint.fallback = true to resume from an older one"
            )

        # First, as data that cannot be resumed must be refused before any weight is overwritten.
        self.dataset = resume_dataset(
            self.dataset, self.config, self._identity["fingerprint"], checkpoint, state
        )

        # The tensors are views of the model's and the optimizer's memory, and are read in place.
        weights = self.engine.model_state_dict()
        optimizer_state = self.engine.optimizer_state_dict()
        load_job_shards(checkpoint, self._by_checkpoint_name(weights, optimizer_state), self.layout)
        self.engine.load_state_dict(optimizer_state)

        self.step = state["step"]
        self.num_tokens = state["tokens"]
        self._next_sequence = state["next_sequence"]
        self.num_predicted_tokens = state.get("predicted_tokens")
        self.num_text_bytes = state.get("text_bytes")
        self.seconds = state["seconds"]
        self.cpu_seconds = state["cpu_seconds"]

        self._divergence_monitor.is_finite = state.get("finite", True)
        # Rank 0 decides: a network file system may show stale contents to other ranks.
        self.evaluations.last_step = mesh.broadcast_object(
            self.folder.last_evaluation(self.step), self.layout
        )
        # Older checkpoints do not count failures.
        self.evaluations.num_failures = state.get("evaluation_failures", 0)

    def close(self) -> None:
        """Release the data and the run folder."""
        # A prefetch thread that does not end in time may still use the dataset: leave it open.
        if self._loader.close():
            self.dataset.close()
        self.folder.release()


def _check_supported(config: Config, layout: ParallelLayout) -> None:
    """Check that layout and installed packages fit the config, before anything is built.

    Raises:
        UserError: They do not.
    """
    resolve_micro_batch_size(config, layout)
    check_head_engine(config, layout)
    if config.evaluation.every_steps and layout.model_parallel_size > 1:
        raise UserError(
            f"evaluation.every_steps = {config.evaluation.every_steps} needs the whole model in "
            "one process: use 0 and `bitlm eval` on the checkpoints"
        )
