"""Plot the evaluations of runs over what they cost. Imports no torch."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitlm_dist.errors import UserError
from bitlm_dist.evaluation.compare import APPROXIMATE, NOT_RECORDED, OTHER_TEXT
from bitlm_dist.evaluation.judgement import best_bits_per_byte
from bitlm_dist.evaluation.run_records import RunRecord
from bitlm_dist.plots import new_figure, save_plot
from bitlm_dist.training.evaluation_records import ScoredText, scored_text

AXES = {
    "predicted_tokens": "predicted tokens",
    "text_bytes": "bytes of text",
    "tokens": "positions",
    "cpu_seconds": "CPU-seconds of training, rank 0",
    "seconds": "seconds of training",
}

Curve = list[dict[str, Any]]


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


def choose_curves(records: Sequence[RunRecord]) -> tuple[list[Curve], str]:
    """Choose each run's evaluations of one text, the same for all runs if possible.

    Returns:
        The evaluations of each run, one per step; and a note on their texts, empty if it is one.
    """
    choices = [_curves_by_text(record) for record in records]
    own = [max(curves.values(), key=len) for curves in choices]
    if len(records) == 1:
        return own, ""

    texts = set.intersection(*({text for text in curves if text} for curves in choices))
    shared = {text: [curves[text] for curves in choices] for text in texts}
    longest = max(shared.values(), key=lambda curves: min(map(len, curves)), default=[])
    # Single points, e.g. of `bitlm eval`, do not replace curves.
    if longest and (min(map(len, longest)) > 1 or max(map(len, own)) == 1):
        return longest, ""

    is_recorded = all(scored_text(curve[-1]) for curve in own)
    return own, (
        f"{OTHER_TEXT} scored on different texts: no comparison"
        if is_recorded
        else f"{NOT_RECORDED} which texts were scored is not recorded"
    )


def _curves_by_text(record: RunRecord) -> dict[ScoredText | None, Curve]:
    """A run's evaluations by text, one per step: the first, which is training's if it made one."""
    by_step: dict[ScoredText | None, dict[int, dict[str, Any]]] = defaultdict(dict)
    for entry in record.evaluations:
        by_step[scored_text(entry)].setdefault(entry["step"], entry)
    return {text: list(entries.values()) for text, entries in by_step.items()}


def plot(records: Sequence[RunRecord], axis: str, file: Path) -> None:
    """Plot bits per byte against ``axis``, one curve per run; the band is one standard error."""
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    curves, note = choose_curves(records)

    for record, curve in zip(records, curves, strict=True):
        points = [
            (entry, bits_per_byte)
            for entry in curve
            if (bits_per_byte := best_bits_per_byte(entry["validation"])) is not None
        ]
        spent = [entry[axis] for entry, _ in points]
        value = [bits_per_byte for _, bits_per_byte in points]
        error = [entry["validation"]["bits_per_byte_se"] or 0.0 for entry, _ in points]

        mark = f" {APPROXIMATE}" if record.note else ""
        (line,) = axes.plot(spent, value, marker="o", markersize=3, label=f"{record.name}{mark}")
        low, high = ([v + sign * e for v, e in zip(value, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(spent, low, high, color=line.get_color(), alpha=0.15, linewidth=0)

    axes.set_xlabel(AXES[axis])
    axes.set_ylabel("bits per byte, held out")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title=note or None, title_fontsize="small")
    save_plot(figure, file)
