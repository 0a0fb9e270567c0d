"""Compare runs: held-out quality against cost, from their evaluations. Imports no torch."""

from collections.abc import Sequence
from typing import Any

from bitlm_dist.evaluation.run_records import RunRecord, has_same_text, num_tokens
from bitlm_dist.formatting import format_value, plural, ratio_or_none

COLUMNS = ("run", "m", "tokens", "predicted", "bits per byte", "chain", "ratio", "CPU-s")
# further columns in Markdown, where lines may be long
MARKDOWN_COLUMNS = (
    "seed",
    "nats per token",
    "delta",
    "Brier-1 -2 …",
    "command",
)
APPROXIMATE = "*"
OTHER_TEXT = "†"
NOT_RECORDED = "?"


def table_rows(records: Sequence[RunRecord]) -> list[list[str]]:
    """Build one row per run, in the order of ``COLUMNS``; ratios are relative to the first run."""
    return [_row(record, records[0]) for record in records]


def _row(record: RunRecord, base: RunRecord) -> list[str]:
    latest = record.latest
    report = latest["validation"]
    chain = report["chain_bits_per_byte"]
    mark = f" {APPROXIMATE}" if record.note else ""

    # without an exact likelihood, the value is an upper bound
    bound = "" if report["exact"] else "<= "
    bits_per_byte = format_value(report["bits_per_byte"])
    standard_error = format_value(report["bits_per_byte_se"])

    return [
        record.name,
        str(record.config.model.block_size),
        _millions(latest.get("tokens")),
        _millions(latest.get("predicted_tokens")),
        f"{bound}{bits_per_byte} ± {standard_error}{mark}",
        "" if chain is None else f"{chain:.4f}{mark}",
        f"{format_value(ratio(record, base), '{:.3f}')}{mark}{_text_mark(record, base)}",
        format_value(latest.get("cpu_seconds"), "{:,.0f}"),
    ]


def _millions(count: int | None) -> str:
    return format_value(None if count is None else count / 1e6, "{:.2f}M")


def ratio(record: RunRecord, base: RunRecord) -> float | None:
    """Bits per byte relative to another run; None if the two were scored on different texts."""
    if has_same_text(record, base) is False:
        return None
    return ratio_or_none(record.bits_per_byte, base.bits_per_byte)


def _text_mark(record: RunRecord, base: RunRecord) -> str:
    return {True: "", False: f" {OTHER_TEXT}", None: f" {NOT_RECORDED}"}[
        has_same_text(record, base)
    ]


def footnotes(records: Sequence[RunRecord]) -> list[str]:
    """Explain the marks, one line per run that has one."""
    base = records[0]
    notes = [
        f"{APPROXIMATE} {record.name}: bits per byte are approximate: {record.note}"
        for record in records
        if record.note
    ]

    for record in records:
        name = record.name
        is_same = has_same_text(record, base)
        if is_same is None:
            notes.append(
                f"{NOT_RECORDED} {name}: which text was scored is not recorded (older version): "
                f"the ratio to {base.name} holds only for the same text"
            )
        elif not is_same:
            notes.append(
                f"{OTHER_TEXT} {name}: no ratio, as it was scored on another text than "
                f"{base.name} ({plural(num_tokens(record), 'token')}, not the same "
                f"{num_tokens(base):,}): run `bitlm eval` on both, with the same data and "
                "--evaluation.num_sequences 0"
            )
    return notes


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
            f"`{record.command or 'not recorded'}`",
        )
        lines.append("| " + " | ".join([*row, *more]) + " |")

    if marked := footnotes(records):
        # the backslash keeps Markdown from reading the mark as a list
        lines += ["", *(f"\\{note}" for note in marked)]
    return "\n".join(lines)


def json_report(records: Sequence[RunRecord]) -> dict[str, Any]:
    """The comparison as a document: the runs in their order, and the footnotes."""
    base = records[0]
    runs = [
        {
            "run": str(record.folder),
            "block_size": record.config.model.block_size,
            "seed": record.config.training.seed,
            "command": record.command,
            "best_bits_per_byte": record.bits_per_byte,
            "ratio": ratio(record, base),
            "same_text": has_same_text(record, base),
            **record.latest,
        }
        for record in records
    ]
    return {"base": str(base.folder), "runs": runs, "notes": footnotes(records)}
