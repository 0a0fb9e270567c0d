"""`bitlm bench generate`: tokens a second of written text, with a key-value cache."""

from dataclasses import dataclass
from typing import Any

import torch

from bitlm_dist.bench.contest import Contender, Runner, contest
from bitlm_dist.bench.results import Results, describe, environment_of, settings_of
from bitlm_dist.bench.train import as_softmax, plain_codes, refuse_itself
from bitlm_dist.codes import bits_needed
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.inference.generate import generate_batch
from bitlm_dist.model.build import build_model, check_machine
from bitlm_dist.parallel import mesh
from bitlm_dist.planning.flops import generation_flops
from bitlm_dist.planning.memory import check_memory, generation_bytes


@dataclass(frozen=True)
class Request:
    """What is written: ``batch`` rows of ``tokens`` new tokens after a prompt of ``prompt`` tokens."""

    vocabulary: int
    batch: int
    tokens: int
    prompt: int


class Writer(Runner):
    """Writes the request with an untrained model: the cost does not depend on the weights."""

    def __init__(self, config: Config, request: Request) -> None:
        self.model = build_model(config, plain_codes(request.vocabulary), eos=1).to(mesh.device()).eval()
        self.config, self.request = config, request

    def prepare(self) -> None:
        """Read the prompt and write the first block."""
        request, m = self.request, self.model.block_size
        prompts = torch.full((request.batch, request.prompt // m * m), 2, device=mesh.device())
        blocks = 1 + -(-request.tokens // m)
        self._text = generate_batch(self.model, prompts, bos=0, blocks=blocks, sampling=self.config.sampling, seed=0)
        next(self._text)

    def __call__(self) -> int:
        """See :class:`~bitlm_dist.bench.contest.Runner`: the blocks after the first."""
        m, blocks = self.model.block_size, 0
        for block in self._text:
            assert block.shape == (self.request.batch, m)
            blocks += 1
        return self.request.batch * blocks * m


def build_writer(config: Config, request: Request) -> Runner:
    """Built in the child."""
    return Writer(config, request)


def bench_generate(config: Config, request: Request, against: list[str], samplers: list[str], repeats: int) -> Results:
    """Time writing with each sampler, and with what it is compared with, in turn.

    Args:
        config: checked.
        request: what to write.
        against: of ``softmax``.
        samplers: ``sequential``, or ``ode:K`` for K steps, ``sde:K``; empty: as the config says.
        repeats: at least 1.
    """
    check_machine(config)
    refuse_itself(config, against)
    if "plain" in against:
        raise UserError("--vs plain compares training steps: use it with `bitlm bench train`")
    if config.model.output == "softmax":
        configs = {"softmax": config}
    else:
        named = samplers or [_name_of(config)]
        configs = {f"bits {name}": with_sampler(config, name) for name in named}
    first = next(iter(configs))
    if "softmax" in against:
        configs["softmax"] = as_softmax(config)
    check_memory({name: generation_bytes(c, request.vocabulary) for name, c in configs.items()})
    contenders = {name: Contender(build_writer, (c, request)) for name, c in configs.items()}
    timings = contest(contenders, repeats=repeats)
    bits, keys = bits_needed(request.vocabulary), request.prompt + request.tokens / 2
    sides: dict[str, Any] = {}
    for name, timing in timings.items():
        sides[name] = describe(timing, generation_flops(configs[name], bits, request.vocabulary, keys), 1.0)
    return Results(
        kind="generate",
        first=first,
        sides=sides,
        settings={
            **settings_of(config, request.vocabulary, repeats),
            "batch": request.batch,
            "new_tokens": request.tokens,
            "prompt_tokens": request.prompt,
        },
        environment=environment_of(),
    )


def _name_of(config: Config) -> str:
    sampling = config.sampling
    return sampling.sampler if sampling.sampler == "sequential" else f"{sampling.sampler}:{sampling.steps}"


def with_sampler(config: Config, name: str) -> Config:
    """The config with sampler ``sequential``, ``ode:K`` or ``sde:K``; raises :class:`UserError` for another name."""
    sampler, _, steps = name.partition(":")
    if sampler not in ("sequential", "ode", "sde") or (steps and not steps.isdigit()):
        raise UserError(f"--sampler {name}: write sequential, ode:K or sde:K with K steps, e.g. ode:8")
    update = {"sampler": sampler, "steps": int(steps or config.sampling.steps)}
    return config.model_copy(update={"sampling": config.sampling.model_copy(update=update)}).check()
