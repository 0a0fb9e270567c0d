"""Checks of the acceptance run that train: the recipes, a kill with a resume, and two cards."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bitlm_dist.acceptance.commands import CheckFailedError, CheckSkippedError
from bitlm_dist.acceptance.context import Context
from bitlm_dist.acceptance.sizes import CONFIG, RECIPES

KILLED_RUN = "run-killed"
LOSS_TOLERANCE = 1e-4  # relative, fp32: other orders of summation
NORM_TOLERANCE = 1e-3


def recipe_words(context: Context, name: str, num_cards: int = 1) -> list[str]:
    """Config and overrides of a recipe's run, without those that do not change its costs."""
    sizes = context.sizes
    return [
        *(CONFIG, *RECIPES[name], *sizes.model, "--training.precision", sizes.precision),
        *("--training.steps", str(sizes.steps)),
        *("--training.global_batch_tokens", str(sizes.tokens_per_step * num_cards)),
    ]


def train_recipe(context: Context, name: str, *more: str, num_cards: int = 1) -> dict[str, Any]:
    """Train a recipe and measure it.

    Returns:
        ``tokens_per_second`` (median of the second half), ``peak_bytes`` of the card, the losses.
    """
    run = context.folder / f"run-{name}-{num_cards}-{len(more)}"
    words = [*recipe_words(context, name, num_cards), *more]
    records = _train(context, run, words, num_cards)
    context.remove(run)  # a checkpoint of 0.6B has 10 GB

    late = records[len(records) // 2 :]
    return {
        "num_cards": num_cards,
        "steps": len(records),
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in late),
        "peak_bytes": max(r["device_memory_peak_bytes"] or 0 for r in records) or None,
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
    }


def check_fp8(context: Context) -> dict[str, Any]:
    """Train the default recipe in fp8, if Transformer Engine is there."""
    found = context.finding("Transformer Engine")
    if found is not None and not found["found"]:
        raise CheckSkippedError(f"Transformer Engine is not installed: {found['note']}")
    return train_recipe(context, "default", "--training.precision", "fp8")


def check_resume(context: Context) -> dict[str, Any]:
    """Kill a training process and resume it: the same losses as without the kill, bit by bit."""
    words = _small_words(context, context.sizes.precision)
    expected = _losses(_reference_run(context, words))

    run = context.folder / KILLED_RUN
    _, _, steps_before_kill = context.sizes.compared_steps
    words = _with_run_keys(context, run, words)
    command = [sys.executable, "-m", "bitlm_dist", "train", *words]
    with context.commands.started(command, {}) as process:
        code = context.commands.wait(
            process, lambda: _last_step(run) >= steps_before_kill and bool(_saved_steps(run))
        )
        if code is not None:
            raise CheckFailedError(f"training ended before it could be killed, exit code {code}")

    # the context has killed it
    killed_at = _last_step(run)
    saved = _saved_steps(run)
    context.commands.bitlm("train", *words)
    found = _losses(_read_metrics(run))
    context.remove(run)
    if found != expected:
        different = [s for s, (a, b) in enumerate(zip(found, expected, strict=False), 1) if a != b]
        raise CheckFailedError(
            f"after a kill at step {killed_at} and a resume, losses or norms differ from those of "
            f"an uninterrupted run, first at step {different[0] if different else len(found)}"
        )
    return {"killed_at_step": killed_at, "saved": saved, "steps_equal": len(found)}


def check_layout(context: Context, name: str) -> dict[str, Any]:
    """Train on two cards and compare the losses with those of one."""
    if context.num_ranks < 2:
        raise CheckSkippedError("there is one card")

    # fp32, where the order of summation is all that may differ
    words = _small_words(context, "fp32")
    expected = _losses(_reference_run(context, words))
    run = context.folder / f"run-{name}"
    found = _losses(_train(context, run, [*words, *context.sizes.layouts[name]], num_cards=2))
    context.remove(run)

    limits = (LOSS_TOLERANCE, NORM_TOLERANCE)
    for step, (pair, expected_pair) in enumerate(zip(found, expected, strict=True), 1):
        for x, y, limit in zip(pair, expected_pair, limits, strict=True):
            if not abs(x - y) <= limit * abs(y):  # true of NaN as well
                raise CheckFailedError(f"step {step}: {x:.7g} on two cards, {y:.7g} on one")
    return {"steps_compared": len(found)}


def _small_words(context: Context, precision: str) -> list[str]:
    """Config and overrides of the runs whose losses are compared."""
    return [
        *(CONFIG, *RECIPES["default"], *context.sizes.small, "--training.precision", precision),
        *("--training.steps", str(context.sizes.compared_steps[0])),
        *("--training.global_batch_tokens", "2048" if context.sizes.device == "gpu" else "256"),
        *("--parallel.micro_batch_size", "2"),
        *("--training.deterministic", str(context.sizes.device == "gpu").lower()),
        *("--optimizer.warmup_steps", "5"),
    ]


def _reference_run(context: Context, words: list[str]) -> list[dict[str, Any]]:
    """Metrics of an uninterrupted run on one card; each run is made once."""
    key = " ".join(words)
    if key not in context.reference_runs:
        run = context.folder / f"run-reference-{len(context.reference_runs)}"
        context.reference_runs[key] = _train(context, run, words, num_cards=1)
        context.remove(run)
    return context.reference_runs[key]


def _train(context: Context, run: Path, words: list[str], num_cards: int) -> list[dict[str, Any]]:
    """Train as a user does and return the metrics of all steps.

    Raises:
        CheckFailedError: training failed, or a loss is not finite.
    """
    words = _with_run_keys(context, run, words)
    if num_cards == 1:
        context.commands.bitlm("train", *words)
    else:
        options = ("-n", str(num_cards), "--max-restarts", "0")
        context.commands.bitlm("launch", "local", *words, *options)

    records = _read_metrics(run)
    for record in records:
        if record["loss"] is None or record["grad_norm"] is None:
            raise CheckFailedError(f"step {record['step']}: loss or gradient norm is not finite")
    return records


def _with_run_keys(context: Context, run: Path, words: list[str]) -> list[str]:
    """Add folders, data and what is not needed."""
    every = str(context.sizes.compared_steps[1] if run.name == KILLED_RUN else 0)
    keys = {
        "logging.tensorboard": "false",
        "run.dir": str(run),
        "data.path": str(context.data),
        "checkpoint.every_steps": every,
    }
    return [*words, *(word for key, value in keys.items() for word in (f"--{key}", value))]


def _read_metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _last_step(run: Path) -> int:
    return max((record["step"] for record in _read_metrics(run)), default=0)


def _saved_steps(run: Path) -> list[str]:
    """Names of the checkpoints, which are complete or absent."""
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def _losses(records: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in records]
