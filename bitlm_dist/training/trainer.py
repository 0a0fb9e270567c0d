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

from bitlm_dist.checkpoint import store
from bitlm_dist.checkpoint import tensors as tensor_files
from bitlm_dist.config import Config
from bitlm_dist.data.loader import Loader
from bitlm_dist.data.manifest import read_manifest
from bitlm_dist.data.mixed_feed import training_feed
from bitlm_dist.data.vocabulary import make_codes
from bitlm_dist.errors import UserError
from bitlm_dist.launch.attempts import stop_files
from bitlm_dist.model.build import check_machine
from bitlm_dist.model.language_model import Batch, LanguageModel
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ALONE, Layout, check_batch
from bitlm_dist.parallel.sliced import Sliced
from bitlm_dist.training.checkpointing import Checkpoints
from bitlm_dist.training.continuation import continued, record
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.memory_advice import out_of_memory
from bitlm_dist.training.metrics import MetricsLog, NoLog
from bitlm_dist.training.run_folder import BATCH, RunFolder, environment
from bitlm_dist.training.sharded_head import check_engine
from bitlm_dist.training.stopping import SIGNALS, Interrupted, StopRequests, name_of
from bitlm_dist.training.teacher import Teacher
from bitlm_dist.training.weights import saved_as, state_name, weight_name

Observer = Callable[[Mapping[str, Any]], None]
Evaluator = Callable[[LanguageModel], Mapping[str, Any]]
MAX_SKIPPED = 20  # non-finite steps in a row


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
        if config.evaluation.every_steps and layout.model > 1:
            raise UserError(
                f"evaluation.every_steps = {config.evaluation.every_steps} needs the whole model in one process: "
                "use 0 and `bitlm eval` on the checkpoints"
            )
        manifest = read_manifest(config.data.path)
        codes = make_codes(config.model, config.data.path, manifest)
        self._teacher = Teacher.of_config(config, manifest["tokenizer"]["fingerprint"], layout)
        self.folder = RunFolder(config.run.dir)
        done = store.complete_steps(self.folder.checkpoints)
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
        self.engine = Engine(config, codes, eos=manifest["eos"], layout=layout)
        self._identity = {
            "fingerprint": {**self.feed.fingerprint(), BATCH: config.training.global_batch_tokens},
            "config": config.model_dump(mode="json"),
            "environment": environment(),
        }
        self.sequences = config.training.global_batch_tokens // config.data.sequence_length
        self.step = self.tokens = self._skipped = self._sequence = 0  # ``_sequence``: the next one to be read
        self.seconds = self.cpu_seconds = 0.0  # spent in steps
        self._steps_here = 0  # that this process has taken
        self._finite = True  # loss and gradient norm of the last step
        self._evaluated = 0  # the last step that was
        self._stop = self._stop_requests()
        self._stopped_by: str | None = None
        self.checkpoints = Checkpoints(self.folder.checkpoints, config.checkpoint, layout)
        self.folder.check_shared(layout)
        found = self.checkpoints.find()
        if found is not None:
            self._load(*found)
        if layout.rank == 0:
            self.folder.record(config, config.data.path / "tokenizer", codes)
            self.folder.drop_metrics_after(self.step)
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
            evaluate: called with the model when ``evaluation.every_steps`` says so; its result goes to evaluations.jsonl.
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
            except Exception:
                self._give_way()
                raise

    def _stop_requests(self) -> StopRequests:
        return StopRequests([self.folder.stop_file, *stop_files(os.environ)], self.layout.rank)

    @contextmanager
    def _logs(self) -> Iterator[MetricsLog | NoLog]:
        log = MetricsLog(self.folder.path, self.config.logging) if self.layout.rank == 0 else NoLog()
        self.checkpoints.report = log.write_save
        try:
            yield log
        finally:
            log.close()

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
        return self.step >= self.config.training.steps and not self._evaluation_due()

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
        self._steps_here += 1
        self._skipped = 0 if update.made else self._skipped + 1
        if self._skipped >= MAX_SKIPPED:
            raise RuntimeError(f"the gradient norm was not finite in {MAX_SKIPPED} steps in a row, up to step {self.step}")
        self.step += 1
        self._sequence += self.sequences
        tokens = self.sequences * self.config.data.sequence_length
        self.tokens += tokens
        loss = float(update.loss)  # waits for the device
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.cpu_seconds += time.process_time() - cpu_began
        self._finite = isfinite(loss) and isfinite(update.norm)
        self.checkpoints.judge(self.step, self._finite)
        return {
            **self._spent(),
            "sequences": self._sequence,
            "loss": loss,
            "grad_norm": update.norm,
            "tokens_per_second": tokens / seconds,
            "lr_factor": update.factor,
            "skipped": int(not update.made),
            **self.feed.counts(self.step),
        }

    def _spent(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluation_due(self) -> bool:
        every = self.config.evaluation.every_steps
        due = self._due(every) or (every > 0 and self.step == self.config.training.steps)
        return due and self.step > self._evaluated

    def _evaluate_if_due(self, evaluate: Evaluator | None, log: MetricsLog | NoLog) -> None:
        """Evaluate, unless something asks to stop meanwhile: then the resumed run does."""
        if evaluate is None or not self._evaluation_due():
            return
        try:
            with self.engine.evaluating() as model, self._stop.interruptible():
                found = evaluate(model)
        except Interrupted:
            return
        log.write_evaluation(self._spent(), found)
        self._evaluated = self.step

    def _save(self, wait: bool) -> None:
        self.checkpoints.save(self.step, self._contents, self._finite, wait)

    def _contents(self) -> tuple[dict[str, Sliced], dict[str, Any]]:
        """What a checkpoint of this step holds."""
        state = {
            **self._spent(),
            "next_sequence": self._sequence,
            "mixture": record(self.feed, self.sequences, self.step, self._sequence),
            **self._identity,
        }
        return self._saved(self.engine.weights(), self.engine.state()), state

    def _save_finally(self) -> None:
        """Have a checkpoint of the current step, complete, before the run ends or pauses.

        Raises:
            UserError: it could not be written.
        """
        if self.checkpoints.saver.pending:
            self.checkpoints.complete()
        if self.checkpoints.newest != self.step:
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
        self.feed = continued(self.feed, self.config, self._identity["fingerprint"], checkpoint, state)
        weights, optimizer_state = self.engine.weights(), self.engine.state()
        tensor_files.read(checkpoint, self._saved(weights, optimizer_state))
        self.engine.restore(optimizer_state)
        self.step, self.tokens, self._sequence = state["step"], state["tokens"], state["next_sequence"]
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        self._evaluated = mesh.from_first(self.folder.last_evaluation(self.step), self.layout)

    def close(self) -> None:
        """Let go of the data and of the run folder."""
        if self._batches.close():
            self.feed.close()
        self.folder.release()
