"""The training loop."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.codes import BitCodes
from bitlm_dist.config import Config
from bitlm_dist.config_loading import absolute
from bitlm_dist.data.loader import Loader
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.data.mixed_feed import training_feed
from bitlm_dist.data.vocabulary import make_codes
from bitlm_dist.data_prep.tokenizer import Tokenizer
from bitlm_dist.errors import UserError, say
from bitlm_dist.launch.attempts import stop_files
from bitlm_dist.model.build import check_machine
from bitlm_dist.model.language_model import Batch, LanguageModel
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ALONE, Layout, check_batch
from bitlm_dist.parallel.sliced import Sliced
from bitlm_dist.training.checkpoint_place import steps_of
from bitlm_dist.training.checkpointing import Checkpoints
from bitlm_dist.training.continuation import continued, record
from bitlm_dist.training.disk_advice import check_room, checkpoint_bytes
from bitlm_dist.training.divergence import Finiteness
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.memory_advice import out_of_memory
from bitlm_dist.training.metrics import MetricsLog, NoLog
from bitlm_dist.training.periodic_evaluation import PeriodicEvaluation
from bitlm_dist.training.run_folder import BATCH, RunFolder, environment
from bitlm_dist.training.sharded_head import check_engine
from bitlm_dist.training.stopping import SIGNALS, Interrupted, StopRequests, name_of
from bitlm_dist.training.teacher import Teacher
from bitlm_dist.training.wandb_log import check_wandb
from bitlm_dist.training.weights import saved_as, state_name, weight_name

Observer = Callable[[Mapping[str, Any]], None]
Evaluator = Callable[[LanguageModel], Mapping[str, Any]]


class Trainer:
    """A run from its first step, or from its newest checkpoint, to ``training.steps``; every process of the job makes one.

    Args:
        config: checked.
        resume: continue from the newest checkpoint of the run folder, if it has one; False refuses a folder that has.
        layout: of the job.

    Raises:
        UserError: data, folder, checkpoint, layout or config do not fit; nothing was changed.
    """

    def __init__(self, config: Config, resume: bool = True, layout: Layout = ALONE) -> None:
        self.config, self.layout = config, layout
        if config.data.path is None:
            raise UserError("data.path is not set: name the folder that `bitlm prep` wrote")
        self.attention = check_machine(config)
        check_batch(config, layout)
        check_engine(config, layout)
        check_wandb(config.logging)
        if config.evaluation.every_steps and layout.model > 1:
            raise UserError(
                f"evaluation.every_steps = {config.evaluation.every_steps} needs the whole model in one process: "
                "use 0 and `bitlm eval` on the checkpoints"
            )
        manifest = read_manifest(config.data.path)
        codes = make_codes(config.model, config.data.path, manifest)
        self._teacher = Teacher.of_config(config, manifest["tokenizer"]["fingerprint"], layout)
        self.folder = RunFolder(config.run.dir)
        done = steps_of(config.run.dir)
        if done and not resume:
            raise UserError(
                f"run.dir = {config.run.dir} holds checkpoints up to step {done[-1]}: drop --no-resume or choose another"
            )
        self.feed = training_feed(config)
        if not done:
            self.feed.check_steps(config.training.steps)
        if layout.rank == 0:
            self.folder.claim(config, config.data.path / "tokenizer", codes)
        self.device = mesh.device()
        byte_lengths = Tokenizer.of_folder(config.data.path / "tokenizer").byte_lengths
        self.engine = Engine(config, codes, manifest["eos"], layout, byte_lengths, manifest["bos"])
        self._identity = {
            "fingerprint": {**self.feed.fingerprint(), BATCH: config.training.global_batch_tokens},
            "config": absolute(config).model_dump(mode="json"),
            "environment": environment(),
        }
        self.sequences = config.training.global_batch_tokens // config.data.sequence_length
        self.step = self.tokens = self._sequence = 0  # ``_sequence``: the next one to be read
        self.predicted_tokens: int | None = 0  # None: the run began with a version that did not count them
        self.text_bytes: int | None = 0
        self.seconds = self.cpu_seconds = 0.0  # spent in steps
        self._steps_here = 0  # that this process has taken
        self._finiteness = Finiteness(self.folder)
        self.evaluations = PeriodicEvaluation(config, layout)
        self._flush: Callable[[], None] = lambda: None  # of the log, while there is one
        self._stop = self._stop_requests()
        self._stopped_by: str | None = None
        self.checkpoints = Checkpoints(self.folder.checkpoints, config.checkpoint, layout)
        self.folder.check_shared(layout)
        found = self.checkpoints.find()
        if found is not None:
            self._load(*found)
        self._resumed = self.step  # metrics of later steps are those of a start that was killed
        if layout.rank == 0 and self.step < config.training.steps:
            self._check_room()
        self._unrecorded: BitCodes | None = codes
        share = self.sequences // layout.data
        self._batches = Loader(
            config,
            self.feed,
            begun=self.step,
            first=self._sequence + layout.data_rank * share,
            count=share,
            stride=self.sequences,
            device=self.device,
        )

    def fit(self, until: int | None = None, observe: Observer | None = None, evaluate: Evaluator | None = None) -> None:
        """Train to step ``until`` (default: the end); save when due, at the end, and when something asks to stop.

        Args:
            observe: called with every step's metrics.
            evaluate: called with the model when ``evaluation.every_steps`` says so; its result goes to evaluations.jsonl. It must
                not communicate with other ranks.

        Raises:
            UserError: a checkpoint cannot be written, data are damaged, or three evaluations in a row failed.
            DivergedError: loss or gradient norm was not finite in too many steps in a row or, with the weights, at the end.
        """
        last = min(until or self.config.training.steps, self.config.training.steps)
        with self._stop_requests() as self._stop, self._logs() as log:
            try:
                self._evaluate_if_due(evaluate, log)  # one that a stop cut short
                while self.step < last:
                    began = time.perf_counter(), time.process_time()
                    batch = self._next_batch()
                    save_due = self._agree()
                    if batch is None or self._stopped_by:
                        break
                    metrics = self._train_on(batch, *began)
                    log.write(metrics)
                    if observe:
                        observe(metrics)
                    self._evaluate_if_due(evaluate, log)
                    if save_due or self._due(self.config.checkpoint.every_steps):
                        self._save(wait=self.step == last)
                self._agree()  # a stop may have come with the last evaluation
                self._save_finally()
                self.check_end()
            except Exception:
                self._give_way()
                raise

    def _stop_requests(self) -> StopRequests:
        return StopRequests([self.folder.stop_file, *stop_files(os.environ)], self.layout.rank)

    @contextmanager
    def _logs(self) -> Iterator[MetricsLog | NoLog]:
        log = MetricsLog(self.folder.path, self.config, self.step) if self.layout.rank == 0 else NoLog()
        self.checkpoints.report, self._flush = log.write_save, log.flush
        try:
            yield log
        finally:
            log.close()

    def _check_room(self) -> None:
        named = [pair for chunk in self.engine.chunks for pair in chunk.named_parameters()]
        needed = checkpoint_bytes(self.config, self.engine.parameters, named)
        if warning := check_room(self.config.checkpoint.dir or self.folder.checkpoints, needed, self.config.checkpoint):
            say(f"warning: {warning}")

    def _record(self) -> None:
        """Write config, environment and vocabulary with the first step, evaluation or save; a start without any leaves no trace.

        Raises:
            UserError: it cannot be written.
        """
        codes, self._unrecorded = self._unrecorded, None
        if codes is not None and self.layout.rank == 0:
            assert self.config.data.path is not None
            self.folder.record(self.config, self.config.data.path / "tokenizer", codes)
            self.folder.drop_metrics_after(self._resumed)

    def _next_batch(self) -> Batch | None:
        """The next step's data; None: something asked to stop while it did not come."""
        self._batches.ask(self.step)
        try:
            with self._stop.interruptible():
                self._batches.wait()
        except Interrupted:
            return None
        return self._batches.take()

    def _agree(self) -> bool:
        """Between two steps all processes agree to stop or to go on, and complete a save that all have written.

        Returns:
            Whether time for the next save has come by the first rank's clock.
        """
        overdue = self.checkpoints.overdue and self.layout.rank == 0
        wishes = torch.tensor([self._stop.code, self.checkpoints.saver.writing, overdue], device=self.device)
        stop, writing, save = (mesh.most_of_all(wishes) if self.layout.world > 1 else wishes).tolist()
        self._stopped_by = name_of(stop)
        if self.checkpoints.saver.pending and not writing:
            self.checkpoints.complete()
        return bool(save)

    def _give_way(self) -> None:
        """If the launcher is ending the job, which is why a peer is gone, end as it wishes and say nothing."""
        time.sleep(0)  # lets Python notice a signal that came inside torch
        number = self._stop.code
        if number in SIGNALS and self.layout.world > 1:
            self._stop.restore()
            signal.raise_signal(signal.Signals(number))

    @property
    def stopped_by(self) -> str | None:
        """What ended :meth:`fit` early: the name of a signal, or the stop file."""
        return self._stopped_by

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.step >= self.config.training.steps and not self.evaluations.due(self.step)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over the next global batch -> its metrics."""
        began = time.perf_counter(), time.process_time()
        self._batches.ask(self.step)
        return self._train_on(self._batches.take(), *began)

    def _train_on(self, batch: Batch, began: float, cpu_began: float) -> dict[str, Any]:
        if self._teacher is not None:
            batch = self._teacher.draw(batch, self.step)
        try:
            update = self.engine.step(batch, self.step)
        except torch.OutOfMemoryError as error:
            advice = out_of_memory(self.config, self.layout, self.engine.microbatch, error)
            if self._steps_here == 0:  # it never fitted
                raise UserError(advice) from error
            raise RuntimeError(advice) from error
        self._record()
        self._steps_here += 1
        self.step += 1
        self._sequence += self.sequences
        tokens = self.sequences * self.config.data.sequence_length
        self.tokens += tokens
        # all that the host wants to know, in one wait for the device; fp64 holds counts up to 2^53
        loss, predicted, text = torch.cat([update.loss.double().view(1), update.counts.double()]).tolist()
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.cpu_seconds += time.process_time() - cpu_began
        if self.predicted_tokens is not None and self.text_bytes is not None:
            self.predicted_tokens += int(predicted)
            self.text_bytes += int(text)
        finite = isfinite(loss) and isfinite(update.norm)
        self.checkpoints.judge(self.step, finite)
        self._finiteness.record(self.step, finite)
        return {
            **self._spent(),
            "sequences": self._sequence,
            "loss": loss,
            "grad_norm": update.norm,
            "tokens_per_second": tokens / seconds,
            "predicted_tokens_per_second": predicted / seconds,
            "lr_factor": update.factor,
            "skipped": int(not update.made),
            "evaluation_failures": self.evaluations.failures,
            "weights_finite": self._finiteness.weights,
            **(self._read() if self.layout.rank == 0 else {}),
        }

    def _read(self) -> dict[str, float]:
        """How much of each source was read."""
        return {**self.feed.counts(self.step), **self.feed.epochs(self.step, self._sequence)}

    def epochs_at_end(self) -> dict[str, float]:
        """Epochs of each source that the whole run takes, see :meth:`Feed.epochs`."""
        steps = self.config.training.steps
        return self.feed.epochs(steps, self._sequence + (steps - self.step) * self.sequences)

    def _spent(self) -> dict[str, Any]:
        """What the run has cost up to now; ``tokens`` counts positions, with BOS blocks and padding."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "predicted_tokens": self.predicted_tokens,
            "text_bytes": self.text_bytes,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluate_if_due(self, evaluate: Evaluator | None, log: MetricsLog | NoLog) -> None:
        """Evaluate, unless something asks to stop meanwhile: then the resumed run does.

        Raises:
            UserError: it was the third failure in a row; the run is saved.
        """
        if evaluate is None or not self.evaluations.due(self.step):
            return

        def score() -> Mapping[str, Any]:
            with self.engine.evaluating() as model, self._stop.interruptible():
                return evaluate(model)

        report = self.evaluations.run(self.step, score)
        if report is not None:
            self._record()
            log.write_evaluation(self._spent(), report)
        elif self.evaluations.given_up:
            self._save_finally()
            raise self.evaluations.error(self.step)

    def check_end(self) -> None:
        """Hold that the run, if it is at its end, left a model that is worth something.

        Raises:
            DivergedError: its last loss or gradient norm, or a weight, is not finite.
        """
        if self.step >= self.config.training.steps:
            self._finiteness.check_end(self.step)

    def _save(self, wait: bool) -> None:
        if self.step == self.config.training.steps:
            self._finiteness.check_weights(self.engine, self.layout)
        self._flush()  # a process that is killed later goes on from here
        self.checkpoints.save(self.step, self._contents, self._finiteness.now, wait)

    def _contents(self) -> tuple[dict[str, Sliced], dict[str, Any]]:
        """What a checkpoint of this step holds."""
        state = {
            **self._spent(),
            "next_sequence": self._sequence,
            "evaluation_failures": self.evaluations.failures,
            "mixture": record(self.feed, self.sequences, self.step, self._sequence),
            **self._identity,
        }
        return self._saved(self.engine.weights(), self.engine.state()), state

    def _save_finally(self) -> None:
        """Have a checkpoint of the current step, complete, before the run ends or pauses; step 0 needs none.

        Raises:
            UserError: it could not be written.
        """
        if self.checkpoints.saver.pending:
            self.checkpoints.complete()
        if self.step > 0 and self.checkpoints.newest != self.step:
            self._save(wait=True)
            if self.checkpoints.newest != self.step:
                raise UserError(f"run.dir = {self.folder.path}: the checkpoint of the last step, {self.step}, could not be written")
        if self._stopped_by and self.layout.rank == 0:
            self.folder.stop_file.unlink(missing_ok=True)

    def _saved(self, weights: Mapping[str, Sliced], optimizer_state: Mapping[str, Sliced]) -> dict[str, Sliced]:
        """Both by the names of a checkpoint."""
        tensors = {weight_name(name): tensor for name, tensor in weights.items()}
        for name, tensor in optimizer_state.items():
            parameter, _, slot = name.rpartition(".")
            tensors |= {state_name(n, slot): t for n, t in saved_as(parameter, tensor, self.layout).items()}
        return tensors

    def _load(self, checkpoint: Path, state: Mapping[str, Any]) -> None:
        if state.get("weights_only"):
            raise UserError(
                f"{checkpoint} was imported and holds weights alone: it can be evaluated and written with, not trained on"
            )
        if state.get("weights_finite") is False and state["step"] < self.config.training.steps:
            raise UserError(f"{checkpoint} holds weights that are not finite: checkpoint.fallback = true goes on from an older one")
        self.feed = continued(self.feed, self.config, self._identity["fingerprint"], checkpoint, state)
        weights, optimizer_state = self.engine.weights(), self.engine.state()
        tensor_files.read(checkpoint, self._saved(weights, optimizer_state))
        self.engine.restore(optimizer_state)
        self.step, self.tokens, self._sequence = state["step"], state["tokens"], state["next_sequence"]
        self.predicted_tokens, self.text_bytes = state.get("predicted_tokens"), state.get("text_bytes")
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        self._finiteness.now = state.get("finite", True)
        self.evaluations.last = mesh.from_first(self.folder.last_evaluation(self.step), self.layout)
        self.evaluations.failures = state.get("evaluation_failures", 0)  # older checkpoints do not count them

    def close(self) -> None:
        """Let go of the data and of the run folder."""
        if self._batches.close():
            self.feed.close()
        self.folder.release()
