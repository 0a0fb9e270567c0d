"""The training loop."""

import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from bitlm_dist.checkpoint import store
from bitlm_dist.config import Config
from bitlm_dist.data.feed import Feed
from bitlm_dist.data.shards import read_manifest
from bitlm_dist.data.vocabulary import make_codes
from bitlm_dist.errors import UserError
from bitlm_dist.model.build import check_machine
from bitlm_dist.model.language_model import LanguageModel
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ALONE, Layout, check_batch
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.metrics import MetricsLog
from bitlm_dist.training.run_folder import RunFolder, environment
from bitlm_dist.training.sharded_head import check_engine
from bitlm_dist.training.teacher import Teacher
from bitlm_dist.training.weights import saved_as, state_name, weight_name

Observer = Callable[[Mapping[str, Any]], None]
Evaluator = Callable[[LanguageModel], Mapping[str, Any]]
MAX_SKIPPED = 20  # non-finite steps in a row
MAX_FAILED_SAVES = 3  # in a row


class Trainer:
    """A run from its first step, or from its newest checkpoint, to ``training.steps``; every process of the job makes one.

    Args:
        config: checked.
        resume: continue from the newest checkpoint of the run folder, if it has one; False refuses a folder that has.
        layout: of the job.

    Raises:
        UserError: before anything is written, where data, folder, layout or config do not fit.
    """

    def __init__(self, config: Config, resume: bool = True, layout: Layout = ALONE) -> None:
        self.config, self.layout = config, layout
        if config.data.path is None:
            raise UserError("data.path is not set: name the folder that `bitlm prep` wrote")
        check_machine(config)
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
        self.feed = Feed.of_config(config, "train", config.data.shuffle)
        if layout.rank == 0:
            self.folder.claim(config, config.data.path / "tokenizer", codes)
        self.device = mesh.device()
        self.engine = Engine(config, codes, eos=manifest["eos"], layout=layout)
        self.sequences = config.training.global_batch_tokens // config.data.sequence_length
        self.step = self.tokens = self._skipped = self._failed_saves = 0
        self.seconds = self.cpu_seconds = 0.0  # spent in steps
        self._stop: str | None = None
        if done:
            self._load(store.folder_of(self.folder.checkpoints, done[-1]))
        if layout.rank == 0:
            self.folder.drop_metrics_after(self.step)

    def fit(self, until: int | None = None, observe: Observer | None = None, evaluate: Evaluator | None = None) -> None:
        """Train to step ``until`` (default: the end); save when due, at the end, and when a signal asks to stop.

        Args:
            observe: called with every step's metrics.
            evaluate: called with the model when ``evaluation.every_steps`` says so; its result goes to evaluations.jsonl.
        """
        last = min(until or self.config.training.steps, self.config.training.steps)
        log = MetricsLog(self.folder.path, self.config.logging) if self.layout.rank == 0 else None
        restore = self._catch_signals()
        try:
            while self.step < last and not self._stopping():
                metrics = self.train_step()
                if log:
                    log.write(metrics)
                if observe:
                    observe(metrics)
                if evaluate and self._evaluation_due():
                    with self.engine.evaluating() as model:
                        found = evaluate(model)
                    if log:
                        log.write_evaluation(self._spent(), found)
                if self.step % self.config.checkpoint.every_steps == 0 and self.step < last:
                    self._try_to_save()
            if self.step not in store.complete_steps(self.folder.checkpoints):
                self.save()
        except Exception:
            time.sleep(0)  # lets Python notice a signal that came inside torch
            if self._stop and self.layout.world > 1:  # the launcher is ending the job, which is why a peer is gone
                restore()
                signal.raise_signal(signal.Signals[self._stop])
            raise
        finally:
            if log:
                log.close()
            restore()

    def _stopping(self) -> bool:
        """Whether a signal has reached any process: all of them stop after the same step."""
        if self.layout.world > 1:
            asked = torch.tensor(signal.Signals[self._stop].value if self._stop else 0, device=self.device)
            found = int(mesh.most_of_all(asked))
            self._stop = signal.Signals(found).name if found else None
        return self._stop is not None

    @property
    def stopped_by(self) -> str | None:
        """Name of the signal that ended :meth:`fit` early."""
        return self._stop

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over the global batch -> its metrics."""
        began, cpu_began = time.perf_counter(), time.process_time()
        share = self.sequences // self.layout.data
        batch = self.feed.batch(self.step * self.sequences + self.layout.data_rank * share, share, self.device)
        if self._teacher is not None:
            batch = self._teacher.draw(batch, self.step)
        update = self.engine.step(batch, self.step)
        self._skipped = 0 if update.made else self._skipped + 1
        if self._skipped >= MAX_SKIPPED:
            raise RuntimeError(f"the gradient norm was not finite in {MAX_SKIPPED} steps in a row, up to step {self.step}")
        self.step += 1
        tokens = self.sequences * self.config.data.sequence_length
        self.tokens += tokens
        loss = float(update.loss)  # waits for the device
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.cpu_seconds += time.process_time() - cpu_began
        return {
            **self._spent(),
            "loss": loss,
            "grad_norm": update.norm,
            "tokens_per_second": tokens / seconds,
            "lr_factor": update.factor,
            "skipped": int(not update.made),
        }

    def _spent(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}

    def _evaluation_due(self) -> bool:
        every = self.config.evaluation.every_steps
        return every > 0 and (self.step % every == 0 or self.step == self.config.training.steps)

    def save(self) -> Path:
        """Write a checkpoint of the current step."""
        state = {
            **self._spent(),
            "next_sequence": self.step * self.sequences,
            "fingerprint": self._fingerprint(),
            "environment": environment(),
        }
        tensors = self._saved(self.engine.weights(), self.engine.state())
        return store.save(self.folder.checkpoints, self.step, tensors, state, self.config.checkpoint.keep, self.layout)

    def _try_to_save(self) -> None:
        """Save; a disk that is full for a while does not stop training, one that stays so does."""
        try:
            self.save()
        except store.SaveError as error:
            self._failed_saves += 1
            if self._failed_saves == MAX_FAILED_SAVES:
                raise
            if self.layout.rank == 0:
                said = f"bitlm: {error}; training goes on ({self._failed_saves} of {MAX_FAILED_SAVES} failed saves in a row end it)"
                print(said, file=sys.stderr, flush=True)
        else:
            self._failed_saves = 0

    def _fingerprint(self) -> dict[str, Any]:
        return {**self.feed.fingerprint(), "training.global_batch_tokens": self.config.training.global_batch_tokens}

    def _saved(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Both by the names of a checkpoint."""
        tensors = {weight_name(name): tensor for name, tensor in weights.items()}
        for name, tensor in optimizer_state.items():
            parameter, _, slot = name.rpartition(".")
            tensors |= {state_name(n, slot): t for n, t in saved_as(parameter, tensor, self.layout).items()}
        return tensors

    def _load(self, checkpoint: Path) -> None:
        state = store.read_state(checkpoint)
        for field, value in self._fingerprint().items():
            if state["fingerprint"].get(field) != value:
                raise UserError(f"{checkpoint} was trained with another {field}: the data would not continue where it stopped")
        weights, optimizer_state = self.engine.weights(), self.engine.state()
        store.load(checkpoint, self._saved(weights, optimizer_state), self.layout)
        self.engine.restore(weights, optimizer_state)
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]

    def _catch_signals(self) -> Callable[[], None]:
        """Let SIGTERM, SIGINT and SIGUSR2 end the loop after the current step; returns what restores the old handlers."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop = signal.Signals(number).name

        try:
            old = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
        except ValueError:  # not the main thread: the owner of the process handles signals
            return lambda: None

        def restore() -> None:
            for number, handler in old.items():
                signal.signal(number, handler)

        return restore

    def close(self) -> None:
        """Let go of the data and of the run folder."""
        self.feed.close()
        self.folder.release()
