"""Report of an acceptance run: gpu-CARD.json and the page gpu-CARD.md."""

import re
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from bitlm_dist.acceptance.checks import PREDICTION
from bitlm_dist.files import write_atomically
from bitlm_dist.formatting import format_value
from bitlm_dist.strict_json import to_json

VERSION = 1
GIB = 2**30


class Status(StrEnum):
    """How a check ended."""

    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


class State(StrEnum):
    """How far a run came."""

    RUNNING = "running"
    INTERRUPTED = "interrupted"
    COMPLETE = "complete"


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        name: of the check.
        status: how it ended.
        seconds: how long it took.
        reason: why it failed or was skipped; empty if it is done.
        numbers: what it measured.
        output: the end of the output of a command that failed.
    """

    name: str
    status: Status
    seconds: float
    reason: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    output: str = ""

    @property
    def line(self) -> str:
        """``done``, or ``failed`` or ``skipped`` with the reason."""
        return f"{self.status}: {self.reason}" if self.reason else str(self.status)


@dataclass
class Report:
    """Results so far, and where they were made.

    Attributes:
        machine: as the module machine describes it.
        started: date and time.
        results: in the order of the checks.
        state: how far the run came.
        version: of this format.
    """

    machine: dict[str, Any]
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    results: list[CheckResult] = field(default_factory=list)
    state: State = State.RUNNING
    version: int = VERSION

    @property
    def has_failed(self) -> bool:
        """True if a check failed."""
        return any(result.status == Status.FAILED for result in self.results)

    def to_json(self) -> str:
        """Serialize everything."""
        return to_json(asdict(self), indent=1)

    def save(self, folder: Path) -> None:
        """Write page and JSON, each complete or as it was before."""
        page = self.page(folder)
        write_atomically(page.with_suffix(".json"), self.to_json() + "\n")
        write_atomically(page, self.to_page())

    def page(self, folder: Path) -> Path:
        """Path of the page."""
        return folder / f"gpu-{card_slug(self.machine['card'])}.md"

    def to_page(self) -> str:
        """The page, in Markdown."""
        heads = ("check", "result", "seconds", "reason")
        rows = [[r.name, r.status, f"{r.seconds:.1f}", r.reason] for r in self.results]
        numbers = {r.name: r.numbers for r in self.results if r.status == Status.DONE}
        is_over = self.state == State.COMPLETE
        parts = [
            f"# Acceptance run: {self.machine['card']}",
            f"Written by `make gpu` (`bitlm doctor --accept`), {self.started}."
            + ("" if is_over else f" **Not complete: {self.state}.** Later checks are missing."),
            "## Machine",
            _table(("", ""), _machine_rows(self.machine)),
            "## Checks",
            _table(heads, rows),
            _training_section(numbers, self.machine),
            _generation_section(numbers),
            _attention_section(numbers),
        ]
        return "\n\n".join(filter(None, parts)) + "\n"


def card_slug(card: str) -> str:
    """Name of a card as a part of a file name, e.g. ``h100-80gb-hbm3``."""
    words = re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia "))
    return words.strip("-") or "unknown"


def _table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    """A Markdown table; line breaks and bars in its cells are replaced."""
    lines = [list(heads), ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |"
        for line in lines
    )


def _machine_rows(machine: dict[str, Any]) -> list[list[str]]:
    commit = machine["commit"] or "not in a git checkout"
    memory = machine["memory_bytes"]
    rows = {
        "card": f"{machine['num_cards']} x {machine['card']}",
        "memory": "–" if memory is None else f"{memory / GIB:.1f} GiB",
        "driver": machine["driver"] or "–",
        "CUDA of PyTorch": machine["cuda"] or "none",
        "Python": machine["python"],
        "commit": commit + (" with changes" if machine["changed"] else ""),
        **machine["packages"],
    }
    return [[name, str(value)] for name, value in rows.items()]


def _training_section(numbers: dict[str, dict[str, Any]], machine: dict[str, Any]) -> str:
    """Training runs beside what fake GPUs predicted for them."""
    predictions = numbers.get(PREDICTION, {})
    names = [name for name in numbers if name.startswith("training: ")]
    names += [name for name in predictions if name not in names]
    if not names:
        return ""

    heads = ("run", "tokens/s", "MFU", "peak, GiB", "predicted, GiB", "loss, first … last step")
    rows = []
    for name in names:
        run = numbers.get(name, {})
        prediction = predictions.get(name, {})
        losses = f"{run['first_loss']:.3f} … {run['last_loss']:.3f}" if run else "–"
        rows.append(
            [
                name.removeprefix("training: "),
                format_value(run.get("tokens_per_second"), "{:,.0f}"),
                _format_mfu(run, prediction, machine),
                _format_gib(run.get("peak_bytes")),
                _format_gib(prediction.get("peak_bytes")),
                losses,
            ]
        )
    note = (
        "MFU counts the FLOPs of matrix products per token against the card's dense bf16 peak. The "
        "prediction is the sum of rank 0's allocations on a fake GPU: without fragmentation, "
        "cuBLAS, NCCL and the CUDA context."
    )
    return f"## Training\n\n{_table(heads, rows)}\n\n{note}"


def mfu(run: dict[str, Any], prediction: dict[str, Any], machine: dict[str, Any]) -> float | None:
    """Fraction of the cards' peak that a run reached; None if a part of it is not known."""
    peak = machine["peak_flops"]
    if not run or not prediction or peak is None:
        return None
    flops: float = prediction["flops_per_token"] * run["tokens_per_second"]
    return flops / (peak * run["num_cards"])


def _format_mfu(run: dict[str, Any], prediction: dict[str, Any], machine: dict[str, Any]) -> str:
    fraction = mfu(run, prediction, machine)
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def _format_gib(num_bytes: int | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / GIB:.2f}"


def _generation_section(numbers: dict[str, dict[str, Any]]) -> str:
    rows = [
        [str(run["batch"]), f"{run['tokens_per_second']:,.1f}", _format_gib(run["peak_bytes"])]
        for name, run in numbers.items()
        if name.startswith("generation: ")
    ]
    heads = ("batch", "tokens/s", "peak, GiB")
    return f"## Generation\n\n{_table(heads, rows)}" if rows else ""


def _attention_section(numbers: dict[str, dict[str, Any]]) -> str:
    """Fastest repeat of each backend, forward and backward."""
    rows = [
        [
            f"{shape['length']:,}",
            name,
            *(f"{1e3 * side[direction]:.3g}" for direction in ("forward", "backward")),
            *(f"{side[f'{direction}_tflops']:.3g}" for direction in ("forward", "backward")),
        ]
        for shape in numbers.get("attention bench", {}).get("shapes", [])
        for name, side in shape["sides"].items()
    ]
    heads = ("tokens", "kernel", "forward, ms", "backward, ms", "forward, TFLOP/s", "backward")
    return f"## Attention\n\n{_table(heads, rows)}" if rows else ""
