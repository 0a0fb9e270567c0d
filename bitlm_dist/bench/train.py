"""`bitlm bench train`: tokens a second of whole training steps."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitlm_dist.bench.contest import Contender, Runner, contest
from bitlm_dist.bench.plain import PlainBitLM
from bitlm_dist.bench.results import Results, describe, environment_of, settings_of
from bitlm_dist.codes import BitCodes, bits_needed, natural
from bitlm_dist.config import Config
from bitlm_dist.data.feed import Feed
from bitlm_dist.data.mixed_feed import MixedFeed
from bitlm_dist.errors import UserError
from bitlm_dist.model.build import check_machine, rounded
from bitlm_dist.model.language_model import Batch
from bitlm_dist.parallel import mesh
from bitlm_dist.parallel.layout import Layout
from bitlm_dist.planning.flops import training_flops
from bitlm_dist.planning.memory import check_memory, training_bytes
from bitlm_dist.training.engine import Engine
from bitlm_dist.training.metrics import MetricsLog
from bitlm_dist.training.optimizer import Optimizers


@dataclass(frozen=True)
class Load:
    """What is trained on: synthetic sequences over V tokens, or the config's data where ``real``; steps a repeat."""

    vocabulary: int
    eos: int
    real: bool
    steps: int


def plain_codes(vocabulary: int) -> BitCodes:
    """Codes of a vocabulary without a corpus: the token's number in bits."""
    return BitCodes(natural(vocabulary), bits_needed(vocabulary))


def synthetic_batch(config: Config, vocabulary: int, number: int, device: torch.device) -> Batch:
    """Random tokens, one document a sequence; the cost of a step does not depend on what they are."""
    sequences = config.training.global_batch_tokens // config.data.sequence_length
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(2, vocabulary, (sequences, config.data.sequence_length), generator=generator)
    return Batch(tokens.to(device), torch.zeros_like(tokens, device=device), torch.arange(sequences, device=device))


class StackRunner(Runner):
    """Steps through this project's own path: feed, loss, optimizers, metrics."""

    def __init__(self, config: Config, load: Load) -> None:
        self.config, self.load, self.device = config, load, mesh.device()
        self.engine = Engine(config, plain_codes(load.vocabulary), load.eos, Layout())
        self.folder = tempfile.TemporaryDirectory(prefix="bitlm-bench-")  # goes with the runner
        self.log = MetricsLog(Path(self.folder.name), config, step=0)
        self.feed = Feed.of_config(config, "train", config.data.shuffle) if load.real else None
        self.step = 0

    def _batch(self) -> Batch:
        if self.feed is None:
            return synthetic_batch(self.config, self.load.vocabulary, self.step, self.device)
        sequences = self.config.training.global_batch_tokens // self.config.data.sequence_length
        return self.feed.batch(self.step * sequences, sequences, self.device)

    def __call__(self) -> int:
        """See :class:`~bitlm_dist.bench.contest.Runner`."""
        for _ in range(self.load.steps):
            update = self.engine.step(self._batch(), self.step)
            self.step += 1
            self.log.write({"step": self.step, "loss": float(update.loss), "grad_norm": update.norm})
        return self.load.steps * self.config.training.global_batch_tokens

    def close(self) -> None:
        """See :class:`~bitlm_dist.bench.contest.Runner`."""
        self.log.close()  # its threads write, so before the folder goes
        self.folder.cleanup()


class PlainRunner(Runner):
    """The same steps in plain PyTorch on one batch that lies ready."""

    def __init__(self, config: Config, load: Load) -> None:
        torch.manual_seed(config.training.seed)
        self.config, self.load = config, load
        device = mesh.device()
        self.model = rounded(PlainBitLM(config, plain_codes(load.vocabulary)), config).to(device)
        self.optimizers = Optimizers(dict(self.model.named_parameters()), config.optimizer)
        self.batch = synthetic_batch(config, load.vocabulary, 0, device)

    def __call__(self) -> int:
        """See :class:`~bitlm_dist.bench.contest.Runner`."""
        for _ in range(self.load.steps):
            self.model.loss(self.batch.tokens, self.batch.document_ids).backward()  # type: ignore[no-untyped-call]
            self.optimizers.step(1.0)
        return self.load.steps * self.config.training.global_batch_tokens


def build_stack(config: Config, load: Load) -> Runner:
    """Built in the child."""
    return StackRunner(config, load)


def build_plain(config: Config, load: Load) -> Runner:
    """Built in the child."""
    return PlainRunner(config, load)


def bench_train(config: Config, load: Load, against: list[str], repeats: int) -> Results:
    """Time a config's training steps, and those of what it is compared with, in turn.

    Args:
        config: checked.
        load: what to train on.
        against: of ``softmax`` and ``plain``.
        repeats: at least 1.

    Raises:
        UserError: a model does not fit into memory, before it is built.
    """
    check_machine(config)
    refuse_itself(config, against)
    if "plain" in against and config.model.output != "bits":
        raise UserError("--vs plain compares model.output = bits: the softmax has no plain counterpart")
    configs: dict[str, Config] = {config.model.output: config}
    if "softmax" in against:
        configs["softmax"] = as_softmax(config)
    contenders = {name: Contender(build_stack, (c, load)) for name, c in configs.items()}
    if "plain" in against:
        contenders["plain"] = Contender(build_plain, (config, load))
        configs["plain"] = config
    check_memory({name: training_bytes(c, load.vocabulary) for name, c in configs.items()})
    timings = contest(contenders, repeats=repeats)
    bits = bits_needed(load.vocabulary)
    sides: dict[str, Any] = {}
    for name, timing in timings.items():
        synthetic = name == "plain" or not load.real
        c = configs[name]
        share = synthetic_share(c) if synthetic else predicted_share(Feed.of_config(c, "train", c.data.shuffle), c)
        sides[name] = describe(timing, training_flops(configs[name], bits, load.vocabulary), share)
    return Results(
        kind="train",
        first=config.model.output,
        sides=sides,
        settings={
            **settings_of(config, load.vocabulary, repeats),
            "batch_tokens": config.training.global_batch_tokens,
            "sequence_length": config.data.sequence_length,
            "draws": config.diffusion.draws,
            "data": str(config.data.path) if load.real else "synthetic",
            "steps_a_repeat": load.steps,
        },
        environment=environment_of(),
    )


def synthetic_share(config: Config) -> float:
    """Share of the positions of :func:`synthetic_batch` whose token is predicted: all but the document's first block."""
    return 1 - config.model.block_size / config.data.sequence_length


def predicted_share(feed: Feed | MixedFeed, config: Config) -> float:
    """Share of the positions that training reads from a feed whose token is predicted; the feed is closed."""
    try:
        return feed.predicted_share(config.training.steps)
    finally:
        feed.close()


def refuse_itself(config: Config, against: list[str]) -> None:
    """Raise :class:`UserError` where the config is already what it is to be compared with."""
    if config.model.output in against:
        raise UserError(f"--vs {config.model.output}: model.output is that already; leave it at bits")


def as_softmax(config: Config) -> Config:
    """The baseline with the same backbone, data and optimizers."""
    model = config.model.model_copy(update={"output": "softmax", "block_size": 1})
    return config.model_copy(update={"model": model}).check()
