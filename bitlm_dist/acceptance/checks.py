"""The checks of the acceptance run, in their order: what is quick and tells most comes first."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitlm_dist.acceptance import training
from bitlm_dist.acceptance.commands import CheckFailedError, CheckSkippedError
from bitlm_dist.acceptance.context import Context
from bitlm_dist.acceptance.data import write_text, write_tokenizer
from bitlm_dist.acceptance.sizes import CONFIG, INSIDE_BLOCKS, RECIPES
from bitlm_dist.strict_json import to_json

ATTENTION = ("fa4", "triton", "merge", "flex", "reference")
PREDICTION = "prediction"
BATCH_SIZES = (1, 16)
NO_TESTS_SELECTED = 5  # exit code of pytest
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Check:
    """A named check.

    Attributes:
        name: as in the report.
        seconds: limit.
        run: makes the check and returns what it measured; raises CheckFailedError or
            CheckSkippedError.
    """

    name: str
    seconds: float
    run: Callable[[Context], dict[str, Any]]


def all_checks(context: Context) -> list[Check]:
    """Every check, whether or not it can be made here."""
    num_cards = int(context.machine["num_cards"])
    recipes = [
        Check(f"training: {name}", 150, partial(training.train_recipe, name=name))
        for name in RECIPES
    ]
    all_cards = Check(
        f"training: default, {num_cards} cards",
        200,
        partial(training.train_recipe, name="default", num_cards=num_cards),
    )

    return [
        Check("doctor", 90, check_doctor),
        *(Check(f"attention: {name}", 120, partial(check_attention, name)) for name in ATTENTION),
        Check("attention inside blocks", 90, partial(check_attention, INSIDE_BLOCKS)),
        Check("data", 120, prepare_data),
        Check(PREDICTION, 240, predict),
        Check("training: fp8", 150, training.check_fp8),
        *recipes,
        *([all_cards] if num_cards > 1 else []),
        Check("kill -9 and resume", 150, training.check_resume),
        *(
            Check(f"two cards: {name}", 150, partial(training.check_layout, name=name))
            for name in context.sizes.layouts
        ),
        *(
            Check(f"generation: batch {batch}", 90, partial(generate, batch))
            for batch in BATCH_SIZES
        ),
        Check("attention bench", 120, bench_attention),
        Check("tests on GPUs", 240, run_tests),
    ]


def check_doctor(context: Context) -> dict[str, Any]:
    """Run `bitlm doctor`; its device must be usable."""
    found = json.loads(context.commands.bitlm("doctor", "--json"))
    context.findings = {f["name"]: f for findings in found.values() for f in findings}
    device = context.findings["device"]
    if not device["found"]:
        raise CheckFailedError(device["note"])
    return {
        "device": device["note"],
        "not_found": [name for name, f in context.findings.items() if not f["found"]],
    }


def check_attention(name: str, context: Context) -> dict[str, Any]:
    """Compare an attention backend with the reference in fp64, in a process of its own."""
    found = context.finding(name)
    if found is not None and not found["found"]:
        raise CheckSkippedError(found["note"])

    sizes = context.sizes
    numbers: dict[str, Any] = context.commands.module(
        "kernels", name, ",".join(sizes.dtypes), ",".join(map(str, sizes.head_dims))
    )
    if numbers["mismatches"]:
        case, mismatch = next(iter(numbers["mismatches"].items()))
        others = len(numbers["mismatches"]) - 1
        raise CheckFailedError(f"{case}: {mismatch}" + (f"; and {others} more" if others else ""))
    if not numbers["num_cases"]:
        raise CheckSkippedError(next(iter(numbers["not_supported"].values())))
    return numbers


def prepare_data(context: Context) -> dict[str, Any]:
    """Prepare the sample text with a vocabulary of the real size."""
    tokenizer = context.folder / "tokenizer.json"
    text = context.folder / "text.jsonl"
    write_tokenizer(tokenizer, context.sizes.vocab_size)
    write_text(text, context.sizes.num_documents)
    words = (str(text), "--tokenizer", str(tokenizer), "--out", str(context.data))
    context.commands.bitlm("prep", *words)

    manifest = json.loads((context.data / "manifest.json").read_text())
    return {"vocabulary": manifest["vocabulary"]}


def predict(context: Context) -> dict[str, Any]:
    """What fake GPUs predict for the training runs that follow, by the name of their check."""
    counts = sorted({1, int(context.machine["num_cards"])})
    runs = {
        f"training: {name}" + (f", {count} cards" if count > 1 else ""): {
            "words": training.recipe_words(context, name, count),
            "world_size": count,
            "vocab_size": context.sizes.vocab_size,
        }
        for count in counts
        for name in (RECIPES if count == 1 else ("default",))
    }
    try:
        numbers: dict[str, Any] = context.commands.module(
            "predict", to_json(runs), CUDA_VISIBLE_DEVICES=""
        )
    except CheckFailedError as error:
        if error.code != 2:
            raise
        raise CheckSkippedError(str(error)) from None  # a CPU build without a C++ compiler
    return numbers


def generate(batch: int, context: Context) -> dict[str, Any]:
    """Measure generation by an untrained model of the default recipe."""
    sizes = context.sizes
    words = (CONFIG, *RECIPES["default"], *sizes.model)
    numbers = (batch, *sizes.generation, sizes.vocab_size)
    found: dict[str, Any] = context.commands.module("generation", *map(str, numbers), *words)
    return found


def bench_attention(context: Context) -> dict[str, Any]:
    """Measure the attention backends beside causal flash attention and SDPA."""
    words = ("bench", "attention", *context.sizes.attention_bench, "--json")
    results = context.commands.parse(context.commands.bitlm(*words))
    return {
        "shapes": [
            {
                "length": result["shape"]["length"],
                "sides": {
                    name: {direction: min(side[direction]) for direction in ("forward", "backward")}
                    | {
                        f"{direction}_tflops": side[f"{direction}_work"]
                        / min(side[direction])
                        / 1e12
                        for direction in ("forward", "backward")
                    }
                    for name, side in result["sides"].items()
                },
            }
            for result in results["results"]
        ]
    }


def run_tests(context: Context) -> dict[str, Any]:
    """Run the tests marked gpu, where the repository is."""
    if context.sizes.device == "cpu":
        raise CheckSkippedError("they need a GPU")
    tests = REPOSITORY / "tests"
    if not tests.is_dir() or find_spec("pytest") is None:
        raise CheckSkippedError("the package is installed without its tests, or without pytest")

    words = ("-m", "pytest", "-m", "gpu", str(tests), "--rootdir", str(REPOSITORY), "-p")
    command = [sys.executable, *words, "no:cacheprovider"]
    try:
        output = context.commands.run(command, {"PYTHONPATH": _python_path()})
    except CheckFailedError as error:
        if error.code == NO_TESTS_SELECTED:
            raise CheckSkippedError("pytest selected no test") from None
        raise
    lines = [line for line in output.splitlines() if " passed" in line]
    return {"pytest": lines[-1].strip("= ") if lines else ""}


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
