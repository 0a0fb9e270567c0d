"""Golden losses: 20 fp32 steps of the quickstart model on file, so that a diff shows any change.

`make golden` rewrites the files. Floats are written such that they are read back bit by bit.

Losses repeat bit by bit if the same code runs the same instructions, so each file records the
machine type that made it: the CPU (vendor, family, model), the vector instructions that torch uses
on it, and the versions of the numerical libraries. On the same type comparisons are exact,
otherwise to the tolerances below.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from ranks import run_ranks

HERE = Path(__file__).parent
NUM_STEPS = 20
LOSS_TOLERANCE = 1e-5  # relative, on another machine type
NORM_TOLERANCE = 1e-4
LIBRARIES = ("torch", "megatron-core", "deepspeed", "numpy")
DP2 = ["--parallel.head.zero_stage", "2"]
# Two sequences per step, so that two ranks have one each.
COMMON = [
    "--training.global_batch_tokens",
    "512",
    "--logging.tensorboard",
    "false",
    "--checkpoint.every_steps",
    "0",
]
# By file name: number of ranks, overrides of the config `quickstart`.
CASES = {
    "default": (1, ["--preset", "default"]),
    "default-dp2-zero2": (2, ["--preset", "default", *DP2]),
    "paper": (1, ["--preset", "paper"]),
    "paper-dp2-zero2": (2, ["--preset", "paper", *DP2]),
}


@dataclass(frozen=True)
class Golden:
    """The contents of a file.

    Attributes:
        machine: The machine type.
        data: SHA-256 of the prepared text's index.
        losses: Loss of each step.
        grad_norms: Gradient norm of each step, before clipping.
    """

    machine: dict[str, str]
    data: str
    losses: list[float]
    grad_norms: list[float]


def machine_type() -> dict[str, str]:
    """All that decides whether losses repeat bit by bit."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        facts = dict(
            re.findall(
                r"^(vendor_id|cpu family|model)\s*: (.*)$",
                Path("/proc/cpuinfo").read_text(),
                re.MULTILINE,
            )
        )
        cpu = " ".join([cpu, *(f"{name} {value}" for name, value in facts.items())])

    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"cpu": cpu, "instructions": torch.backends.cpu.get_cpu_capability(), **versions}


def measure(case: str, data: Path) -> Golden:
    """Train a case on prepared data, with one thread per rank."""
    num_ranks, overrides = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        words = [*COMMON, *overrides, "--data.path", str(data), "--run.dir", f"{folder}/run"]
        run_ranks(
            num_ranks,
            "parity",
            "fit_in_turn",
            "quickstart",
            [(words, NUM_STEPS)],
            folder=Path(folder),
        )
        lines = [
            json.loads(line)
            for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        ]

    index = hashlib.sha256((data / "train" / "index.json").read_bytes()).hexdigest()
    return Golden(
        machine_type(),
        index,
        [line["loss"] for line in lines],
        [line["grad_norm"] for line in lines],
    )


def load_golden(file: Path) -> Golden:
    """Read a file.

    Raises:
        ValueError: It holds no golden losses. The message names it.
    """
    try:
        return Golden(**json.loads(file.read_text()))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} holds no golden losses: {error}") from None


def save_golden(golden: Golden, file: Path) -> None:
    """Write a file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(golden), indent=1) + "\n")
    partial.replace(file)


def machine_difference(a: Golden, b: Golden) -> str:
    """Describe how the machine types differ; empty if they are the same."""
    keys = [key for key in a.machine if a.machine[key] != b.machine.get(key)]
    return ", ".join(f"{key} {a.machine[key]} and {b.machine.get(key)}" for key in keys)


def differences(expected: Golden, found: Golden) -> list[str]:
    """Describe the differences, one line each.

    Values must be identical on the same machine type, and within the tolerances on another.
    """
    if expected.data != found.data:
        return ["the prepared text is another: its index has another hash"]
    if len(expected.losses) != len(found.losses):
        return [f"{len(expected.losses)} steps and {len(found.losses)}"]

    exact = not machine_difference(expected, found)
    lines = []
    for name, a, b, tolerance in (
        ("loss", expected.losses, found.losses, LOSS_TOLERANCE),
        ("gradient norm", expected.grad_norms, found.grad_norms, NORM_TOLERANCE),
    ):
        bound = 0.0 if exact else tolerance
        # "not <=" counts NaN as a difference, too.
        bad = [
            step
            for step, (x, y) in enumerate(zip(a, b, strict=True), 1)
            if not abs(x - y) <= bound * abs(x)
        ]
        if bad:
            largest = max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))
            first = bad[0]
            lines.append(
                f"{name} differs in {len(bad)} of {len(a)} steps, first in step {first} "
                f"({a[first - 1]!r} and {b[first - 1]!r}), by {largest:.1e} at most"
            )

    return lines
