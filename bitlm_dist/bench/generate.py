"""`bitlm bench generate`: tokens per second of generation with a key-value cache."""

import re
from dataclasses import dataclass
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
from bitlm_dist.bench.results import Results, common_settings, machine_environment, summarize_timing
from bitlm_dist.bench.train import (
    check_baselines_differ,
    natural_bit_codes,
    softmax_baseline_config,
)
from bitlm_dist.codes import num_bits_needed
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.inference.generate import generate_batch
from bitlm_dist.model.build import build_model, prepare_device
from bitlm_dist.parallel import mesh
from bitlm_dist.planning.flops import generation_flops
from bitlm_dist.planning.memory import check_memory, generation_bytes


@dataclass(frozen=True)
class GenerationWorkload:
    """Batch to generate: ``batch_size`` rows of ``num_new_tokens`` tokens after a prompt of
    ``num_prompt_tokens`` tokens.
    """

    vocab_size: int
    batch_size: int
    num_new_tokens: int
    num_prompt_tokens: int


class GenerationRunner(BenchRunner):
    """Generates with an untrained model: the cost does not depend on the weights."""

    def __init__(self, config: Config, workload: GenerationWorkload) -> None:
        codes = natural_bit_codes(workload.vocab_size)
        with mesh.device():
            self.model = build_model(config, codes, eos=1).to(mesh.device()).eval()
        self.config = config
        self.workload = workload

    @override
    def prepare(self) -> None:
        """Process the prompt and generate the first block."""
        workload = self.workload
        m = self.model.block_size

        # the prompt is cut to whole blocks
        prompts = torch.full(
            (workload.batch_size, workload.num_prompt_tokens // m * m), 2, device=mesh.device()
        )
        blocks = 1 + -(-workload.num_new_tokens // m)
        self._block_iterator = generate_batch(
            self.model, prompts, bos=0, num_blocks=blocks, sampling=self.config.sampling, seed=0
        )

        # the first block includes the pass over the prompt
        next(self._block_iterator)

    @override
    def __call__(self) -> int:
        """Generate the blocks after the first."""
        m = self.model.block_size
        blocks = 0
        for block in self._block_iterator:
            assert block.shape == (self.workload.batch_size, m)
            blocks += 1

        return self.workload.batch_size * blocks * m


def build_generation_runner(config: Config, workload: GenerationWorkload) -> BenchRunner:
    """Build a :class:`GenerationRunner` in the child process."""
    return GenerationRunner(config, workload)


def bench_generate(
    config: Config,
    workload: GenerationWorkload,
    baselines: list[str],
    samplers: list[str],
    repeats: int,
    show: ShowProgress = show_nothing,
) -> Results:
    """Time generation with each sampler and each baseline, in turn.

    Args:
        config: the checked config.
        workload: batch to generate.
        baselines: may hold ``softmax``.
        samplers: ``sequential``, or ``ode:K`` and ``sde:K`` for K steps; empty: as configured.
        repeats: at least 1.
        show: shows what is done.

    Raises:
        UserError: a baseline or sampler does not apply, or the models do not fit into memory.
    """
    prepare_device(config)
    check_baselines_differ(config, baselines)
    if "plain" in baselines:
        raise UserError("--vs plain compares training steps: use it with `bitlm bench train`")

    # the side that the others are compared with comes first
    configs = _configs_by_sampler(config, samplers)
    first = next(iter(configs))
    if "softmax" in baselines:
        configs["softmax"] = softmax_baseline_config(config)
    with show("checking memory"):
        check_memory(
            {name: generation_bytes(c, workload.vocab_size) for name, c in configs.items()}
        )

    variants = {
        name: Variant(build_generation_runner, (c, workload)) for name, c in configs.items()
    }
    timings = time_interleaved(variants, repeats=repeats, show=show)

    return Results(
        kind="generate",
        first=first,
        sides=_summarize_sides(configs, workload, timings),
        settings={
            **common_settings(config, workload.vocab_size, repeats),
            "batch": workload.batch_size,
            "new_tokens": workload.num_new_tokens,
            "prompt_tokens": workload.num_prompt_tokens,
        },
        environment=machine_environment(),
    )


def _summarize_sides(
    configs: dict[str, Config], workload: GenerationWorkload, timings: dict[str, Timing]
) -> dict[str, dict[str, Any]]:
    # the cache grows by one token per step, so half of the new tokens on average
    bits = num_bits_needed(workload.vocab_size)
    mean_context_length = workload.num_prompt_tokens + workload.num_new_tokens / 2
    sides = {}
    for name, timing in timings.items():
        sides[name] = summarize_timing(
            timing,
            generation_flops(configs[name], bits, workload.vocab_size, mean_context_length),
            1.0,  # every generated token is predicted
        )

    return sides


def _configs_by_sampler(config: Config, samplers: list[str]) -> dict[str, Config]:
    """Config of each side; a softmax model has a single sampler."""
    if config.model.output == "softmax":
        return {"softmax": config}

    sampler_names = samplers or [_sampler_name(config)]
    return {f"bits {name}": with_sampler(config, name) for name in sampler_names}


def _sampler_name(config: Config) -> str:
    sampling = config.sampling
    return (
        sampling.sampler
        if sampling.sampler == "sequential"
        else f"{sampling.sampler}:{sampling.steps}"
    )


def with_sampler(config: Config, name: str) -> Config:
    """Return the config with another sampler.

    Args:
        config: the config to copy.
        name: ``sequential``, ``ode:K`` or ``sde:K``.

    Raises:
        UserError: there is no such sampler.
    """
    if not re.fullmatch(r"sequential|(ode|sde)(:[1-9]\d*)?", name):
        raise UserError(
            f"--sampler {name}: write sequential, ode:K or sde:K with K steps, e.g. ode:8"
        )

    sampler, _, steps = name.partition(":")
    update = {"sampler": sampler, "steps": int(steps or config.sampling.steps)}
    return config.model_copy(update={"sampling": config.sampling.model_copy(update=update)}).check()
