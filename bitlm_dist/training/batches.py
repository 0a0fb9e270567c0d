"""The batches of a run: read one step ahead, and annotated by the teacher."""

from contextlib import nullcontext

from bitlm_dist.config import Config
from bitlm_dist.data.loader import Loader
from bitlm_dist.data.mixture_dataset import MixtureDataset
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.readback import Moment
from bitlm_dist.training.step_pipeline import TimedBatch
from bitlm_dist.training.stop_signals import StopMonitor, StopRequested
from bitlm_dist.training.teacher import Teacher
from bitlm_dist.training.train_state import TrainState


class Batches:
    """This data rank's part of every global batch.

    Args:
        config: the run's config.
        layout: the job's parallel layout.
        dataset: the training data.
        engine: takes the steps, and knows where a batch carries loss on this rank.
        teacher: annotates the batches; None: there is none.
        state: the step and the position in the data to start from.
    """

    def __init__(
        self,
        config: Config,
        layout: ParallelLayout,
        dataset: PackedDataset | MixtureDataset,
        engine: Engine,
        teacher: Teacher | None,
        state: TrainState,
    ) -> None:
        self._dataset = dataset
        self._teacher = teacher
        self._is_alone = layout.world_size == 1

        sequences_per_step = config.training.global_batch_tokens // config.data.sequence_length
        num_local_sequences = sequences_per_step // layout.data
        self.loader = Loader(
            config,
            dataset,
            engine.target_finder(dataset.max_targets_per_sequence),
            start_step=state.step,
            first_sequence=state.next_sequence + layout.data_rank * num_local_sequences,
            num_sequences=num_local_sequences,
            stride=sequences_per_step,
            device=mesh.device(),
        )

    def next(self, step: int, stop_monitor: StopMonitor) -> TimedBatch | None:
        """Wait for the batch of a step.

        A rank of a larger job waits until the batch is there, as others may have launched the step.

        Returns:
            The batch; None if a stop was requested meanwhile.

        Raises:
            UserError: a shard is damaged.
        """
        began = Moment.now()
        self.loader.start(step)
        try:
            with stop_monitor.interruptible() if self._is_alone else nullcontext():
                self.loader.wait()
        except StopRequested:
            return None

        wait_seconds = Moment.now().seconds - began.seconds
        batch = self.loader.get()
        if self._teacher is not None:
            batch = self._teacher.annotate(batch, step)
        return TimedBatch(batch, began, wait_seconds)

    def close(self) -> None:
        """Release the data."""
        # A prefetch thread that does not end in time may still use the dataset: leave it open.
        if self.loader.close():
            self._dataset.close()
