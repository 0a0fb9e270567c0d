"""Compare runs: held-out quality against cost, from the evaluations that training wrote."""

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitlm_dist.config import Config
from bitlm_dist.config_loading import load_run_config
from bitlm_dist.errors import UserError
from bitlm_dist.formatting import format_value, ratio_or_none
from bitlm_dist.training.metrics import EVALUATIONS

AXES = {
    "predicted_tokens": "predicted tokens",
    "text_bytes": "bytes of text",
    "tokens": "positions",
    "cpu_seconds": "CPU-seconds of training",
    "seconds": "seconds of training",
}
COLUMNS = ("run", "m", "tokens", "predicted", "bits per byte", "chain", "ratio", "CPU-s")
# further columns in Markdown, where lines may be long
MARKDOWN_COLUMNS = (
    "seed",
    "nats per token",
    "delta",
    "Brier-1 -2 …",
    "command",
)


@dataclass(frozen=True)
class RunRecord:
    """A run: its config, the command that trained it, and its evaluations in order of steps."""

    folder: Path
    config: Config
    command: str
    evaluations: list[dict[str, Any]]

    @property
    def latest(self) -> dict[str, Any]:
        """The latest evaluation."""
        return self.evaluations[-1]

    @property
    def footnote_mark(self) -> str:
        """Mark for bits per byte that are approximate; empty if they are exact."""
        return " *" if self.note else ""

    @property
    def note(self) -> str | None:
        """Reason why the bits per byte are not those of the text.

        None: they are, or the evaluation predates the check.
        """
        note: str | None = self.latest["validation"].get("bytes_note")
        return note

    @property
    def bits_per_byte(self) -> float | None:
        """The best known value, see :func:`best_bits_per_byte`."""
        return best_bits_per_byte(self.latest["validation"])


def best_bits_per_byte(report: dict[str, Any]) -> float | None:
    """Return the lower of bound and chain rule, in bits per byte; both hold for the same model.

    None: neither has a value.
    """
    # The chain rule is exact where the bound is not.
    values = [
        report[name]
        for name in ("bits_per_byte", "chain_bits_per_byte")
        if report[name] is not None
    ]
    return min(values, default=None)


def load_record(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: the folder is not a run folder, or training wrote no evaluations.
    """
    config = load_run_config(folder)
    file = folder / EVALUATIONS
    evaluations = _load_evaluations(file)
    if not evaluations:
        raise UserError(f"{folder} holds no evaluations: train it with --evaluation.every_steps N")

    words = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["command"]
    # the first word is the path of the executable on the machine of the run
    command = shlex.join(["bitlm", *words[1:]])
    return RunRecord(folder, config, command, evaluations)


def _load_evaluations(file: Path) -> list[dict[str, Any]]:
    """Read the evaluations in a file, if it exists."""
    evaluations = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        # a killed run may leave a truncated line
        with suppress(json.JSONDecodeError):
            evaluations.append(json.loads(line))
    return evaluations


def table_rows(records: Sequence[RunRecord]) -> list[list[str]]:
    """Build one row per run, in the order of ``COLUMNS``; ratios are relative to the first run."""
    return [_row(record, records[0].bits_per_byte) for record in records]


def _millions(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def choose_axis(records: Sequence[RunRecord], requested: str | None) -> str:
    """Choose the x-axis of the plot.

    It is the requested one, else the predicted tokens if every run counted them, else positions.

    Raises:
        UserError: a run was trained by a version that did not count the requested quantity.
    """
    lacking = [
        r.folder
        for r in records
        if any(entry.get(requested or "predicted_tokens") is None for entry in r.evaluations)
    ]

    if requested is None:
        return "tokens" if lacking else "predicted_tokens"
    if lacking:
        raise UserError(
            f"--axis {requested}: {lacking[0]} was trained by a version that did not count it: "
            "use tokens"
        )
    return requested


def _row(record: RunRecord, reference: float | None) -> list[str]:
    latest = record.latest
    report = latest["validation"]
    chain = report["chain_bits_per_byte"]
    mark = record.footnote_mark

    # without an exact likelihood, the value is an upper bound
    bound = "" if report["exact"] else "<= "
    bits_per_byte = format_value(report["bits_per_byte"])
    standard_error = format_value(report["bits_per_byte_se"])
    ratio = format_value(ratio_or_none(record.bits_per_byte, reference), "{:.3f}")

    return [
        record.folder.name,
        str(record.config.model.block_size),
        f"{latest['tokens'] / 1e6:.2f}M",
        format_value(_millions(latest.get("predicted_tokens")), "{:.2f}M"),
        f"{bound}{bits_per_byte} ± {standard_error}{mark}",
        "" if chain is None else f"{chain:.4f}{mark}",
        f"{ratio}{mark}",
        f"{latest['cpu_seconds']:,.0f}",
    ]


def footnotes(records: Sequence[RunRecord]) -> list[str]:
    """Explain the marked bits per byte, one line per run."""
    return [
        f"* {record.folder.name}: bits per byte are approximate: {record.note}"
        for record in records
        if record.note
    ]


def markdown_table(records: Sequence[RunRecord]) -> str:
    """Format the table in Markdown, for the docs, with the command of each run."""
    columns = (*COLUMNS, *MARKDOWN_COLUMNS)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]

    for row, record in zip(table_rows(records), records, strict=True):
        report = record.latest["validation"]
        more = (
            str(record.config.training.seed),
            format_value(report["nats_per_token"], "{:.3f}"),
            format_value(report["context_shuffle_delta_nats"], "{:.2f}"),
            " ".join(f"{score:.1f}" for score in report["brier"]),
            f"`{record.command}`",
        )
        lines.append("| " + " | ".join([*row, *more]) + " |")

    if marked := footnotes(records):
        # the backslash keeps Markdown from reading the mark as a list
        lines += ["", *(f"\\{note}" for note in marked)]
    return "\n".join(lines)


def plot(records: Sequence[RunRecord], axis: str, file: Path) -> None:
    """Plot bits per byte against ``axis``, one curve per run; the band is one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()

    for record in records:
        points = [
            (entry, bits_per_byte)
            for entry in record.evaluations
            if (bits_per_byte := best_bits_per_byte(entry["validation"])) is not None
        ]
        spent = [entry[axis] for entry, _ in points]
        value = [bits_per_byte for _, bits_per_byte in points]
        error = [entry["validation"]["bits_per_byte_se"] or 0.0 for entry, _ in points]

        (line,) = axes.plot(
            spent,
            value,
            marker="o",
            markersize=3,
            label=f"{record.folder.name}{record.footnote_mark}",
        )
        low, high = ([v + sign * e for v, e in zip(value, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(spent, low, high, color=line.get_color(), alpha=0.15, linewidth=0)

    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("bits per byte, held out")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file)
