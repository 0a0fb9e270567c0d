"""`bitlm bench data`: tokens a second that the loader alone delivers, beside those that training consumes."""

from typing import Any

from bitlm_dist.bench.contest import Contender, Runner, contest
from bitlm_dist.bench.results import Results, describe, environment_of, settings_of
from bitlm_dist.bench.train import Load, build_stack, predicted_share
from bitlm_dist.codes import bits_needed
from bitlm_dist.config import Config
from bitlm_dist.data.mixed_feed import training_feed
from bitlm_dist.model.build import check_machine
from bitlm_dist.parallel import mesh
from bitlm_dist.planning.flops import Flops, training_flops

COLD, WARM, TRAINING = "data, cold", "data, warm", "training"


class ColdRunner(Runner):
    """Opens the folder, plans the first epoch and reads from its first shards on, as a run that begins does."""

    def __init__(self, config: Config, steps: int) -> None:
        self._config, self._steps = config, steps

    def __call__(self) -> int:
        """See :class:`~bitlm_dist.bench.contest.Runner`."""
        feed = training_feed(self._config)
        size = self._config.training.global_batch_tokens // self._config.data.sequence_length
        for step in range(self._steps):
            feed.batch(step * size, size, mesh.device())
        feed.close()
        return self._steps * self._config.training.global_batch_tokens


class WarmRunner(Runner):
    """Goes on where the repeat before stopped."""

    def __init__(self, config: Config, steps: int) -> None:
        self._config, self._steps, self._step = config, steps, 0
        self._feed = training_feed(config)

    def __call__(self) -> int:
        """See :class:`~bitlm_dist.bench.contest.Runner`."""
        size = self._config.training.global_batch_tokens // self._config.data.sequence_length
        for _ in range(self._steps):
            self._feed.batch(self._step * size, size, mesh.device())
            self._step += 1
        return self._steps * self._config.training.global_batch_tokens


def build_cold(config: Config, steps: int) -> Runner:
    """Built in the child."""
    return ColdRunner(config, steps)


def build_warm(config: Config, steps: int) -> Runner:
    """Built in the child."""
    return WarmRunner(config, steps)


def bench_data(config: Config, load: Load, steps: int, repeats: int) -> Results:
    """Time the reading of a config's data cold and warm, and its training steps, in turn.

    Args:
        config: checked; its data is read.
        load: of the training steps.
        steps: batches that a repeat of the reading reads.
        repeats: at least 1.
    """
    check_machine(config)
    contenders = {
        COLD: Contender(build_cold, (config, steps)),
        WARM: Contender(build_warm, (config, steps)),
        TRAINING: Contender(build_stack, (config, load)),
    }
    timings = contest(contenders, repeats=repeats)
    flops = {TRAINING: training_flops(config, bits_needed(load.vocabulary), load.vocabulary)}
    share = predicted_share(training_feed(config), config)
    sides: dict[str, Any] = {name: describe(timing, flops.get(name, Flops(0, 0, 0, 0)), share) for name, timing in timings.items()}
    return Results(
        kind="data",
        first=COLD,
        sides=sides,
        settings={
            **settings_of(config, load.vocabulary, repeats),
            "batch_tokens": config.training.global_batch_tokens,
            "sequence_length": config.data.sequence_length,
            "packing": config.data.packing,
            "data": str(config.data.path),
            "batches_a_repeat": steps,
        },
        environment=environment_of(),
    )
