"""`bitlm bench data`: tokens per second of the data loader alone, beside those of training."""

from pathlib import Path
from typing import Any

from typing_extensions import override

from bitlm_dist.bench.interleaved import (
    BenchRunner,
    ShowProgress,
    Variant,
    show_nothing,
    time_interleaved,
)
from bitlm_dist.bench.results import Results, common_settings, machine_environment, summarize_timing
from bitlm_dist.bench.train import (
    Workload,
    build_stack_runner,
    measure_predicted_fraction,
    scratch_folder,
)
from bitlm_dist.codes import num_bits_needed
from bitlm_dist.config import Config
from bitlm_dist.data.mixture_dataset import training_dataset
from bitlm_dist.model.build import prepare_device
from bitlm_dist.parallel import mesh
from bitlm_dist.planning.flops import Flops, training_flops

COLD = "data, cold"
WARM = "data, warm"
TRAINING = "training"


class ColdRunner(BenchRunner):
    """Opens the dataset, plans the first epoch and reads from the first shards on, as the start of
    a run does.
    """

    def __init__(self, config: Config, num_steps: int) -> None:
        self._config = config
        self._num_steps = num_steps

    @override
    def __call__(self) -> int:
        dataset = training_dataset(self._config)
        num_sequences = (
            self._config.training.global_batch_tokens // self._config.data.sequence_length
        )

        for step in range(self._num_steps):
            dataset.batch(step * num_sequences, num_sequences, mesh.device())

        # the next repeat must open the files again
        dataset.close()
        return self._num_steps * self._config.training.global_batch_tokens


class WarmRunner(BenchRunner):
    """Reads from an open dataset; each repeat continues where the previous one stopped."""

    def __init__(self, config: Config, num_steps: int) -> None:
        self._config = config
        self._num_steps = num_steps
        self._step = 0
        self._dataset = training_dataset(config)

    @override
    def __call__(self) -> int:
        num_sequences = (
            self._config.training.global_batch_tokens // self._config.data.sequence_length
        )

        # batches that were read before could come from a cache
        for _ in range(self._num_steps):
            self._dataset.batch(self._step * num_sequences, num_sequences, mesh.device())
            self._step += 1

        return self._num_steps * self._config.training.global_batch_tokens


def build_cold_runner(config: Config, steps: int) -> BenchRunner:
    """Build a :class:`ColdRunner` in the child process."""
    return ColdRunner(config, steps)


def build_warm_runner(config: Config, steps: int) -> BenchRunner:
    """Build a :class:`WarmRunner` in the child process."""
    return WarmRunner(config, steps)


def bench_data(
    config: Config,
    workload: Workload,
    num_batches: int,
    repeats: int,
    show: ShowProgress = show_nothing,
) -> Results:
    """Time reading a config's data, cold and warm, and its training steps, in turn.

    Args:
        config: the checked config; its data is read.
        workload: of the training steps.
        num_batches: batches to read per repeat.
        repeats: at least 1.
        show: shows what is done.
    """
    prepare_device(config)
    with scratch_folder() as scratch:
        variants = {
            COLD: Variant(build_cold_runner, (config, num_batches)),
            WARM: Variant(build_warm_runner, (config, num_batches)),
            TRAINING: Variant(build_stack_runner, (config, workload, Path(scratch) / TRAINING)),
        }
        timings = time_interleaved(variants, repeats=repeats, show=show)

    # reading computes nothing
    flops = {
        TRAINING: training_flops(config, num_bits_needed(workload.vocab_size), workload.vocab_size)
    }
    fraction = measure_predicted_fraction(training_dataset(config), config)
    sides: dict[str, Any] = {
        name: summarize_timing(timing, flops.get(name, Flops(0, 0, 0, 0)), fraction)
        for name, timing in timings.items()
    }

    return Results(
        kind="data",
        first=COLD,
        sides=sides,
        settings={
            **common_settings(config, workload.vocab_size, repeats),
            "batch_tokens": config.training.global_batch_tokens,
            "sequence_length": config.data.sequence_length,
            "packing": config.data.packing,
            "data": str(config.data.path),
            "batches_a_repeat": num_batches,
        },
        environment=machine_environment(),
    )
