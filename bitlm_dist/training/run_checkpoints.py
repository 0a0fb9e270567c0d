"""The checkpoints of a run in training: what they hold, when they are saved, how one is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitlm_dist.checkpoint.saver import SaveStats
from bitlm_dist.config import Config
from bitlm_dist.config_loading import with_absolute_paths
from bitlm_dist.data.mixture_dataset import MixtureDataset
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.errors import UserError
from bitlm_dist.parallel.sharded_tensor import ShardedTensor
from bitlm_dist.training.checkpointing import CheckpointContents, CheckpointManager
from bitlm_dist.training.data_resumption import mixture_state_dict, resume_dataset
from bitlm_dist.training.disk_space import (
    FreeSpaceWatch,
    check_disk_space,
    estimate_checkpoint_bytes,
)
from bitlm_dist.training.display import SAVING
from bitlm_dist.training.divergence import DivergenceMonitor
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.reporter import Reporter
from bitlm_dist.training.run_claim import GLOBAL_BATCH_KEY
from bitlm_dist.training.run_folder import RunFolder, environment
from bitlm_dist.training.train_state import TrainState
from bitlm_dist.training.weights import load_job_shards, training_tensors


class RunCheckpoints:
    """Saves and loads the checkpoints of a run. Collective, in the same order on all ranks.

    Args:
        config: the run's config.
        engine: holds weights and optimizer state.
        dataset: the data of the config, from the first step of the run.
        folder: the run folder.
        divergence: tells whether a checkpoint is finite.
        reporter: told of saves.

    Attributes:
        manager: decides which checkpoints are healthy and which are kept.
        dataset: the data; :meth:`load` may replace it.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        dataset: PackedDataset | MixtureDataset,
        folder: RunFolder,
        divergence: DivergenceMonitor,
        reporter: Reporter,
    ) -> None:
        self._config = config
        self._engine = engine
        self.dataset = dataset
        self._divergence = divergence
        self._reporter = reporter
        self._sequences_per_step = (
            config.training.global_batch_tokens // config.data.sequence_length
        )

        self._root = folder.checkpoints
        self._space_watch = FreeSpaceWatch(self._root, config.checkpoint)
        self.manager = CheckpointManager(self._root, config.checkpoint, engine.layout)
        self.manager.on_saved = self._record_save

        # the same in all checkpoints
        self._identity = {
            "fingerprint": {
                **dataset.fingerprint(),
                GLOBAL_BATCH_KEY: config.training.global_batch_tokens,
            },
            "config": with_absolute_paths(config).model_dump(mode="json"),
            "environment": environment(),
        }

    def load_latest(self) -> Mapping[str, Any] | None:
        """Load weights, optimizer state and the position in the data from the latest checkpoint.

        Returns:
            The train state of the checkpoint; None if there is none.

        Raises:
            UserError: training cannot continue from this checkpoint.
        """
        found = self.manager.find_resume_point()
        if found is None:
            self.dataset.check_source_limits(self._config.training.steps)
            return None

        checkpoint, saved = found
        self.load(checkpoint, saved)
        return saved

    def load(self, checkpoint: Path, saved: Mapping[str, Any]) -> None:
        """Load a checkpoint.

        Args:
            checkpoint: its folder.
            saved: its train state.

        Raises:
            UserError: training cannot continue from it.
        """
        if saved.get("weights_only"):
            raise UserError(
                f"{checkpoint} was imported and holds weights alone: "
                "it can be evaluated and generated from, but not trained"
            )

        # First, as data that cannot be resumed must be refused before any weight is overwritten.
        self.dataset = resume_dataset(
            self.dataset, self._config, self._identity["fingerprint"], checkpoint, saved
        )

        # The tensors are views of the model's and the optimizer's memory, and are read in place.
        optimizer_state = self._engine.optimizer_state_dict()
        load_job_shards(checkpoint, self._tensors(optimizer_state), self._engine.layout)
        self._engine.load_state_dict(optimizer_state)

    def _tensors(self, optimizer_state: Mapping[str, ShardedTensor]) -> dict[str, ShardedTensor]:
        return training_tensors(
            self._engine.model_state_dict(), optimizer_state, self._engine.layout
        )

    def _contents(self, state: TrainState, num_evaluation_failures: int) -> CheckpointContents:
        """The tensors and the state of a checkpoint."""
        return self._tensors(self._engine.optimizer_state_dict()), {
            **state.record(),
            "evaluation_failures": num_evaluation_failures,
            "mixture": mixture_state_dict(
                self.dataset, self._sequences_per_step, state.step, state.next_sequence
            ),
            **self._identity,
        }

    def is_due(self, step: int) -> bool:
        """True if ``checkpoint.every_steps`` asks for a checkpoint of a step."""
        every = self._config.checkpoint.every_steps
        return every > 0 and step % every == 0

    def save(self, state: TrainState, num_evaluation_failures: int, wait: bool) -> None:
        """Save a checkpoint, in the background unless ``wait`` is True.

        Args:
            state: the state of the run.
            num_evaluation_failures: failed evaluations of the run.
            wait: see :meth:`CheckpointManager.save`.
        """
        if state.step == self._config.training.steps:
            self._divergence.check_weights(self._engine, self._engine.layout)

        # A resumed run never rewrites TensorBoard events up to this step, so they must be on disk.
        self._reporter.log.flush()
        with self._reporter.display.phase(SAVING):
            self.manager.save(
                state.step,
                lambda: self._contents(state, num_evaluation_failures),
                self._divergence.is_finite,
                wait,
            )

    def complete(self, state: TrainState, num_evaluation_failures: int) -> None:
        """Complete a checkpoint of the current step before the run ends or pauses.

        No-op for step 0, or if the checkpoint exists.

        Raises:
            UserError: it could not be written.
        """
        if self.manager.saver.has_pending_save:
            with self._reporter.display.phase(SAVING):
                self.manager.finish_save()

        if state.step > 0 and self.manager.latest_step != state.step:
            self.save(state, num_evaluation_failures, wait=True)
            # A single failed save is tolerated in training, but not here.
            if self.manager.latest_step != state.step:
                raise UserError(
                    f"the checkpoint of the last step, {state.step}, could not be written: "
                    f"{self.manager.last_failure}"
                )

    def check_space(self) -> None:
        """Warn if the checkpoints to be kept will not all fit on their disk.

        Raises:
            UserError: not even the next one fits.
        """
        named = [pair for chunk in self._engine.chunks for pair in chunk.named_parameters()]
        needed = estimate_checkpoint_bytes(self._config, self._engine.num_parameters, named)
        root = self._config.checkpoint.dir or self._root
        self._space_watch.warn(check_disk_space(root, needed, self._config.checkpoint))

    def _record_save(self, saved: SaveStats) -> None:
        """Record a save, and warn while there is time if the next ones may find no room."""
        self._reporter.log.write_save(saved)
        if self._engine.layout.rank == 0 and saved.step < self._config.training.steps:
            self._space_watch.check(saved.bytes)
