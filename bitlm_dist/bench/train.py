"""`bitlm bench train`: tokens per second of complete training steps."""

import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from bitlm_dist.bench.interleaved import (
    BenchRunner,
    ShowProgress,
    Timing,
    Variant,
    show_nothing,
    time_interleaved,
)
from bitlm_dist.bench.plain import PlainBitLM
from bitlm_dist.bench.results import Results, common_settings, machine_environment, summarize_timing
from bitlm_dist.codes import BitCodes, natural_codes, num_bits_needed
from bitlm_dist.config import Config
from bitlm_dist.data.loader import CPU
from bitlm_dist.data.mixture_dataset import MixtureDataset
from bitlm_dist.data.packed_dataset import PackedDataset
from bitlm_dist.errors import UserError
from bitlm_dist.model.batch import Batch
from bitlm_dist.model.build import cast_weights, prepare_device
from bitlm_dist.model.initialization import draw_weights
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import ParallelLayout
from bitlm_dist.planning.flops import training_flops
from bitlm_dist.planning.memory import check_memory, training_bytes
from bitlm_dist.training.agreement import Agreement, Flags
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.metrics import MetricsLog
from bitlm_dist.training.optimizer import Optimizer
from bitlm_dist.training.partitioners.replicated import ReplicatedPartitioner
from bitlm_dist.training.readback import Moment
from bitlm_dist.training.step_pipeline import StepPipeline, TimedBatch


@dataclass(frozen=True)
class Workload:
    """Training data of a bench.

    Attributes:
        vocab_size: number of tokens.
        eos: id of the end-of-sequence token.
        has_data: read the config's data; otherwise the sequences are synthetic.
        steps_per_repeat: training steps per repeat.
    """

    vocab_size: int
    eos: int
    has_data: bool
    steps_per_repeat: int


def natural_bit_codes(vocab_size: int) -> BitCodes:
    """Codes of a vocabulary without a corpus: the token id in binary."""
    return BitCodes(natural_codes(vocab_size), num_bits_needed(vocab_size))


def synthetic_batch(config: Config, vocab_size: int, seed: int, device: torch.device) -> Batch:
    """Draw random tokens, one document per sequence; the cost of a step does not depend on them."""
    num_sequences = config.training.global_batch_tokens // config.data.sequence_length

    # ids below 2 are special tokens
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(
        2, vocab_size, (num_sequences, config.data.sequence_length), generator=generator
    )

    return Batch(tokens, torch.zeros_like(tokens), torch.arange(num_sequences)).to(device)


class StackRunner(BenchRunner):
    """Training steps of this project's stack: dataset, loss, optimizers, metrics.

    Args:
        config: the checked config.
        workload: training data.
        folder: folder to make for the metrics; removed with the runner.
    """

    def __init__(self, config: Config, workload: Workload, folder: Path) -> None:
        self.config = config
        self.workload = workload
        self.device = mesh.device()
        self.engine = Engine(
            config, natural_bit_codes(workload.vocab_size), workload.eos, ParallelLayout()
        )

        self.pipeline = StepPipeline(self.engine, Agreement(Flags, self.engine.layout))

        # metrics are written as in a real run, as they are part of its cost
        self.folder = folder
        folder.mkdir()
        self.log = MetricsLog(folder, config, step=0)
        self.dataset = (
            PackedDataset.from_config(config, "train", config.data.shuffle)
            if workload.has_data
            else None
        )
        max_targets = None if self.dataset is None else self.dataset.max_targets_per_sequence
        self.finder = self.engine.target_finder(max_targets)
        self.step = 0

    def _batch(self) -> Batch:
        """The next batch, as the loader's thread prepares it."""
        config = self.config
        if self.dataset is None:
            batch = synthetic_batch(config, self.workload.vocab_size, self.step, CPU)
        else:
            num_sequences = config.training.global_batch_tokens // config.data.sequence_length
            batch = self.dataset.batch(self.step * num_sequences, num_sequences, CPU)
        return self.finder.find_all(batch).to(self.device)

    @override
    def __call__(self) -> int:
        for _ in range(self.workload.steps_per_repeat):
            batch = TimedBatch(self._batch(), Moment.now(), wait_seconds=0.0)
            self.pipeline.launch(batch, self.step)
            self.step += 1
            # as in a real run, a step is read while the next one runs
            self._log_steps(num_left=1)
        self._log_steps(num_left=0)

        return self.workload.steps_per_repeat * self.config.training.global_batch_tokens

    def _log_steps(self, num_left: int) -> None:
        while len(self.pipeline) > num_left:
            report = self.pipeline.read()
            step = self.step - len(self.pipeline)
            self.log.write({"step": step, "loss": report.loss, "grad_norm": report.grad_norm})

    @override
    def close(self) -> None:
        # first, because its threads write into the folder
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        # the parent removes its folder, unless it was killed
        with suppress(OSError):
            self.folder.parent.rmdir()


class PlainRunner(BenchRunner):
    """The same training steps in plain PyTorch, on one batch that is already on the device."""

    def __init__(self, config: Config, workload: Workload) -> None:
        # plain PyTorch draws noise and the backbone's weights from the global generator
        torch.manual_seed(config.training.seed)
        self.config = config
        self.workload = workload
        device = mesh.device()
        self.model = cast_weights(
            PlainBitLM(config, natural_bit_codes(workload.vocab_size)), config
        ).to(device)
        draw_weights(self.model, config.training.seed)
        named = dict(self.model.named_parameters())
        self.optimizer = Optimizer(config.optimizer, [ReplicatedPartitioner(named)])
        self.batch = synthetic_batch(config, workload.vocab_size, 0, device)

    @override
    def __call__(self) -> int:
        for _ in range(self.workload.steps_per_repeat):
            self.model.loss(self.batch.tokens, self.batch.document_ids).backward()  # type: ignore[no-untyped-call]
            self.optimizer.clip_and_step(1.0)

        return self.workload.steps_per_repeat * self.config.training.global_batch_tokens


def build_stack_runner(config: Config, workload: Workload, folder: Path) -> BenchRunner:
    """Build a :class:`StackRunner` in the child process."""
    return StackRunner(config, workload, folder)


def build_plain_runner(config: Config, workload: Workload) -> BenchRunner:
    """Build a :class:`PlainRunner` in the child process."""
    return PlainRunner(config, workload)


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for the folders of :class:`StackRunner`, whose process may be killed."""
    return tempfile.TemporaryDirectory(prefix="bitlm-bench-", ignore_cleanup_errors=True)


def bench_train(
    config: Config,
    workload: Workload,
    baselines: list[str],
    repeats: int,
    show: ShowProgress = show_nothing,
) -> Results:
    """Time the training steps of a config and of each baseline, in turn.

    Args:
        config: the checked config.
        workload: training data.
        baselines: may hold ``softmax`` and ``plain``.
        repeats: at least 1.
        show: shows what is done.

    Raises:
        UserError: a baseline does not apply, or the models do not fit into memory. Raised before
            any model is built.
    """
    prepare_device(config)
    check_baselines_differ(config, baselines)
    if "plain" in baselines and config.model.output != "bits":
        raise UserError(
            "--vs plain compares model.output = bits: the softmax has no plain counterpart"
        )

    configs: dict[str, Config] = {config.model.output: config}
    if "softmax" in baselines:
        configs["softmax"] = softmax_baseline_config(config)
    if "plain" in baselines:
        configs["plain"] = config

    # all models are in memory at the same time
    with show("checking memory"):
        check_memory({name: training_bytes(c, workload.vocab_size) for name, c in configs.items()})
    timings = _time_steps(configs, workload, repeats, show)

    return Results(
        kind="train",
        first=config.model.output,
        sides=_summarize_sides(configs, workload, timings),
        settings={
            **common_settings(config, workload.vocab_size, repeats),
            "batch_tokens": config.training.global_batch_tokens,
            "sequence_length": config.data.sequence_length,
            "draws": config.diffusion.num_noise_samples,
            "data": str(config.data.path) if workload.has_data else "synthetic",
            "steps_a_repeat": workload.steps_per_repeat,
        },
        environment=machine_environment(),
    )


def _time_steps(
    configs: dict[str, Config], workload: Workload, repeats: int, show: ShowProgress
) -> dict[str, Timing]:
    """Time the training steps of each side; the one named plain is written in plain PyTorch."""
    with scratch_folder() as scratch:
        variants = {
            name: Variant(build_plain_runner, (config, workload))
            if name == "plain"
            else Variant(build_stack_runner, (config, workload, Path(scratch) / name))
            for name, config in configs.items()
        }
        return time_interleaved(variants, repeats=repeats, show=show)


def _summarize_sides(
    configs: dict[str, Config], workload: Workload, timings: dict[str, Timing]
) -> dict[str, dict[str, Any]]:
    bits = num_bits_needed(workload.vocab_size)
    sides = {}
    for name, timing in timings.items():
        # the plain runner always trains on a synthetic batch
        is_synthetic = name == "plain" or not workload.has_data
        fraction = _predicted_fraction(configs[name], is_synthetic)
        sides[name] = summarize_timing(
            timing, training_flops(configs[name], bits, workload.vocab_size), fraction
        )

    return sides


def _predicted_fraction(config: Config, is_synthetic: bool) -> float:
    if is_synthetic:
        return synthetic_predicted_fraction(config)

    dataset = PackedDataset.from_config(config, "train", config.data.shuffle)
    return measure_predicted_fraction(dataset, config)


def synthetic_predicted_fraction(config: Config) -> float:
    """Fraction of the positions of :func:`synthetic_batch` whose token is predicted.

    The first block of a document is not predicted.
    """
    return 1 - config.model.block_size / config.data.sequence_length


def measure_predicted_fraction(dataset: PackedDataset | MixtureDataset, config: Config) -> float:
    """Fraction of the positions read in training whose token is predicted. Closes the dataset."""
    try:
        return dataset.predicted_fraction(config.training.steps)
    finally:
        dataset.close()


def check_baselines_differ(config: Config, baselines: list[str]) -> None:
    """Check that no baseline is the config's own kind of model.

    Raises:
        UserError: one is.
    """
    if config.model.output in baselines:
        raise UserError(
            f"--vs {config.model.output}: model.output is that already; leave it at bits"
        )


def softmax_baseline_config(config: Config) -> Config:
    """Return the config of the softmax baseline: same backbone, data and optimizers."""
    # the softmax predicts single tokens
    model = config.model.model_copy(update={"output": "softmax", "block_size": 1})
    return config.model_copy(update={"model": model}).check()
