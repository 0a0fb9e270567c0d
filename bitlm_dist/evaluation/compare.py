"""Runs side by side: what each was worth on held-out text, for what cost, from the evaluations that training wrote."""

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitlm_dist.config import Config
from bitlm_dist.config_loading import read_run
from bitlm_dist.errors import UserError
from bitlm_dist.evaluation.values import ratio_of, shown
from bitlm_dist.training.metrics import EVALUATIONS

AXES = {
    "predicted_tokens": "predicted tokens",
    "text_bytes": "bytes of text",
    "tokens": "positions",
    "cpu_seconds": "CPU-seconds of training",
    "seconds": "seconds of training",
}
COLUMNS = ("run", "m", "tokens", "predicted", "bits per byte", "chain", "ratio", "CPU-s")
MORE = ("seed", "nats per token", "delta", "Brier-1 -2 …", "command")  # in Markdown, where a line may be long


@dataclass(frozen=True)
class Record:
    """One run: its config, the command that trained it, and its evaluations in order of steps."""

    folder: Path
    config: Config
    command: str
    evaluations: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        """The newest evaluation."""
        return self.evaluations[-1]

    @property
    def mark(self) -> str:
        """Stands behind bits per byte that are not those of the text."""
        return " *" if self.note else ""

    @property
    def note(self) -> str | None:
        """Why its bits per byte are not those of the text; None: they are, or the evaluation is older than the check."""
        note: str | None = self.last["validation"].get("bytes_note")
        return note

    @property
    def bits_per_byte(self) -> float | None:
        """The best value known: the chain rule's where the model has one, which is exact where the bound is not."""
        return best(self.last["validation"])


def best(report: dict[str, Any]) -> float | None:
    """The lower of bound and chain rule, bits per byte; both are truths about the same model. None: neither has a value."""
    known = [report[name] for name in ("bits_per_byte", "chain_bits_per_byte") if report[name] is not None]
    return min(known, default=None)


def read_record(folder: Path) -> Record:
    """Read a run folder.

    Raises:
        UserError: it is none, or training wrote no evaluations.
    """
    config = read_run(folder)
    file = folder / EVALUATIONS
    evaluations = _read_lines(file)
    if not evaluations:
        raise UserError(f"{folder} holds no evaluations: train it with --evaluation.every_steps N")
    words = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["command"]
    command = shlex.join(["bitlm", *words[1:]])
    return Record(folder, config, command, evaluations)


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """The evaluations on file; a line that a kill cut in half is none."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def rows_of(records: Sequence[Record]) -> list[list[str]]:
    """A row a run, in the order of ``COLUMNS``; ratios are to the first run."""
    return [_row(record, records[0].bits_per_byte) for record in records]


def _millions(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def axis_of(records: Sequence[Record], asked: str | None) -> str:
    """The axis to draw runs over: the one asked for, else predicted tokens where every run counted them, else positions.

    Raises:
        UserError: a run was evaluated by a version that did not count what is asked for.
    """
    lacking = [r.folder for r in records if any(entry.get(asked or "predicted_tokens") is None for entry in r.evaluations)]
    if asked is None:
        return "tokens" if lacking else "predicted_tokens"
    if lacking:
        raise UserError(f"--axis {asked}: {lacking[0]} was trained by a version that did not count it: use tokens")
    return asked


def _row(record: Record, reference: float | None) -> list[str]:
    last, report = record.last, record.last["validation"]
    chain = report["chain_bits_per_byte"]
    return [
        record.folder.name,
        str(record.config.model.block_size),
        f"{last['tokens'] / 1e6:.2f}M",
        shown(_millions(last.get("predicted_tokens")), "{:.2f}M"),
        f"{'' if report['exact'] else '<= '}{shown(report['bits_per_byte'])} ± {shown(report['bits_per_byte_se'])}{record.mark}",
        "" if chain is None else f"{chain:.4f}{record.mark}",
        shown(ratio_of(record.bits_per_byte, reference), "{:.3f}") + record.mark,
        f"{last['cpu_seconds']:,.0f}",
    ]


def notes(records: Sequence[Record]) -> list[str]:
    """A line for each run whose bits per byte are marked."""
    return [f"* {record.folder.name}: bits per byte are approximate: {record.note}" for record in records if record.note]


def markdown(records: Sequence[Record]) -> str:
    """The table for docs, with the command of each run."""
    columns = (*COLUMNS, *MORE)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row, record in zip(rows_of(records), records, strict=True):
        report = record.last["validation"]
        more = (
            str(record.config.training.seed),
            shown(report["nats_per_token"], "{:.3f}"),
            shown(report["context_shuffle_delta_nats"], "{:.2f}"),
            " ".join(f"{score:.1f}" for score in report["brier"]),
            f"`{record.command}`",
        )
        lines.append("| " + " | ".join([*row, *more]) + " |")
    if marked := notes(records):
        lines += ["", *(f"\\{note}" for note in marked)]
    return "\n".join(lines)


def plot(records: Sequence[Record], axis: str, file: Path) -> None:
    """Bits per byte over what was spent, a curve a run; the band is one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for record in records:
        points = [(entry, found) for entry in record.evaluations if (found := best(entry["validation"])) is not None]
        spent = [entry[axis] for entry, _ in points]
        value = [found for _, found in points]
        error = [entry["validation"]["bits_per_byte_se"] or 0.0 for entry, _ in points]
        (line,) = axes.plot(spent, value, marker="o", markersize=3, label=f"{record.folder.name}{record.mark}")
        low, high = ([v + sign * e for v, e in zip(value, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(spent, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("bits per byte, held out")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file)
