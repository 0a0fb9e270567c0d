"""The training loop."""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from bitlm_dist.model.build import build_model
from bitlm_dist.model.language_model import Batch, LanguageModel, target_mask
from bitlm_dist.parallel import mesh
from bitlm_dist.training.metrics import MetricsLog
from bitlm_dist.training.optimizer import Optimizers, schedule_factor
from bitlm_dist.training.run_folder import RunFolder, environment

Observer = Callable[[Mapping[str, Any]], None]
Evaluator = Callable[[LanguageModel], Mapping[str, Any]]
MAX_SKIPPED = 20  # non-finite steps in a row


class Trainer:
    """A run from its first step, or from its newest checkpoint, to ``training.steps``.

    Args:
        config: checked.
        resume: continue from the newest checkpoint of the run folder, if it has one; False refuses a folder that has.

    Raises:
        UserError: before anything is written, where data, folder or config do not fit.
    """

    def __init__(self, config: Config, resume: bool = True) -> None:
        self.config = config
        if config.data.path is None:
            raise UserError("data.path is not set: name the folder that `bitlm prep` wrote")
        if config.training.precision == "bf16" and mesh.device().type == "cpu":
            # Megatron's linear layers take part in autocast on CUDA only
            raise UserError("training.precision = bf16 needs a GPU: use fp32 on this machine")
        manifest = read_manifest(config.data.path)
        codes = make_codes(config.model, config.data.path, manifest)
        self.folder = RunFolder(config.run.dir)
        done = store.complete_steps(self.folder.checkpoints)
        if done and not resume:
            raise UserError(
                f"run.dir = {config.run.dir} holds checkpoints up to step {done[-1]}: drop --no-resume or choose another"
            )
        self.feed = Feed.of_config(config, "train", config.data.shuffle)
        self.folder.claim(config, config.data.path / "tokenizer", codes)
        self.device = mesh.device()
        self.model = build_model(config, codes, eos=manifest["eos"]).to(self.device)
        self.optimizers = Optimizers(self.model, config.optimizer)
        self.sequences = config.training.global_batch_tokens // config.data.sequence_length
        self.step = self.tokens = self._skipped = 0
        self.seconds = self.cpu_seconds = 0.0  # spent in steps
        self._stop: str | None = None
        if done:
            self._load(store.folder_of(self.folder.checkpoints, done[-1]))
        self.folder.drop_metrics_after(self.step)

    def fit(self, until: int | None = None, observe: Observer | None = None, evaluate: Evaluator | None = None) -> None:
        """Train to step ``until`` (default: the end); save when due, at the end, and when a signal asks to stop.

        Args:
            observe: called with every step's metrics.
            evaluate: called with the model when ``evaluation.every_steps`` says so; its result goes to evaluations.jsonl.
        """
        last = min(until or self.config.training.steps, self.config.training.steps)
        log = MetricsLog(self.folder.path, self.config.logging)
        restore = self._catch_signals()
        try:
            while self.step < last and self._stop is None:
                metrics = self.train_step()
                log.write(metrics)
                if observe:
                    observe(metrics)
                if evaluate and self._evaluation_due():
                    log.write_evaluation(self._spent(), evaluate(self.model.eval()))
                    self.model.train()
                if self.step % self.config.checkpoint.every_steps == 0 and self.step < last:
                    self.save()
            if self.step not in store.complete_steps(self.folder.checkpoints):
                self.save()
        finally:
            log.close()
            restore()

    @property
    def stopped_by(self) -> str | None:
        """Name of the signal that ended :meth:`fit` early."""
        return self._stop

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over the global batch -> its metrics."""
        began, cpu_began = time.perf_counter(), time.process_time()
        batch = self.feed.batch(self.step * self.sequences, self.sequences, self.device)
        update = optimize(self.model, self.optimizers, batch, self.config, self.step)
        self._skipped = 0 if update.made else self._skipped + 1
        if self._skipped >= MAX_SKIPPED:
            raise RuntimeError(f"the gradient norm was not finite in {MAX_SKIPPED} steps in a row, up to step {self.step}")
        self.step += 1
        self.tokens += batch.tokens.numel()
        loss = float(update.loss)  # waits for the device
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.cpu_seconds += time.process_time() - cpu_began
        return {
            **self._spent(),
            "loss": loss,
            "grad_norm": update.norm,
            "tokens_per_second": batch.tokens.numel() / seconds,
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
        return store.save(self.folder.checkpoints, self.step, self._tensors(), state, self.config.checkpoint.keep)

    def _fingerprint(self) -> dict[str, Any]:
        return {**self.feed.fingerprint(), "training.global_batch_tokens": self.config.training.global_batch_tokens}

    def _tensors(self) -> dict[str, Tensor]:
        return {**model_tensors(self.model), **{f"optimizer.{n}": t for n, t in self.optimizers.state().items()}}

    def _load(self, checkpoint: Path) -> None:
        state = store.read_state(checkpoint)
        for field, value in self._fingerprint().items():
            if state["fingerprint"].get(field) != value:
                raise UserError(f"{checkpoint} was trained with another {field}: the data would not continue where it stopped")
        store.load(checkpoint, self._tensors())
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
        """Let go of the data."""
        self.feed.close()


@dataclass(frozen=True)
class Update:
    """What one optimizer step saw."""

    loss: Tensor  # mean over the valid tokens
    norm: float  # of the gradient, before clipping
    factor: float  # of the learning rates
    made: bool  # False: the norm was not finite


def optimize(model: LanguageModel, optimizers: Optimizers, batch: Batch, config: Config, step: int) -> Update:
    """Update the model on a global batch, microbatch by microbatch."""
    valid = target_mask(batch, model.block_size, model.eos).sum().clamp_min(1)
    loss = torch.zeros((), device=batch.tokens.device)
    sequences = len(batch.tokens)
    rows = config.parallel.microbatch or sequences
    for first in range(0, sequences, rows):
        part = batch.part(slice(first, first + rows))
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=config.training.precision == "bf16"):
            share = model.loss(part, seed=config.training.seed, step=step) / valid
        share.backward()  # type: ignore[no-untyped-call]
        loss += share.detach()
    factor = schedule_factor(config.optimizer, step, config.training.steps)
    norm, made = optimizers.step(factor)
    return Update(loss, norm, factor, made)


def model_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The weights by name, as a checkpoint holds them."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def load_trained(run: Path, config: Config) -> tuple[RunFolder, LanguageModel, int]:
    """The newest checkpoint of a run, for evaluation and generation -> (folder, model, step).

    Args:
        run: the run folder.
        config: its config, overrides applied.

    Raises:
        UserError: the folder holds no complete checkpoint.
    """
    folder = RunFolder(run)
    steps = store.complete_steps(folder.checkpoints)
    if not steps:
        raise UserError(f"{run} holds no checkpoint yet: train it with `bitlm train {run}/config.yaml`")
    model = build_model(config, folder.codes(), eos=folder.tokenizer().eos).to(mesh.device())
    checkpoint = store.folder_of(folder.checkpoints, steps[-1])
    store.read_state(checkpoint)
    store.load(checkpoint, model_tensors(model))
    return folder, model.eval(), steps[-1]
