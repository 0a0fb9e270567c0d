"""What went in, what came out, and why the rest did not: for manifest.json and report.md.

Both hold names of files and numbers, no time and no folder: equal preparations have equal reports.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from bitlm_dist.data_prep import round_trip
from bitlm_dist.data_prep.finding import left_out_in_words, plain
from bitlm_dist.data_prep.reading import CHANGES, REASONS, Batch

ROWS = 30  # sources in report.md, so that it stays a page; manifest.json has all
WORDS = {
    "not_utf8": "not UTF-8",
    "not_json": "no JSON object",
    "no_text": "no text in the field",
    "empty": "empty",
    "too_short": "shorter than --min-chars",
    "too_long": "longer than --max-chars",
    "other_language": "in another language",
    "contaminated": "holds evaluation text",
    "duplicate": "copy of an earlier document",
    "near_duplicate": "nearly a copy of an earlier document",
    "no_tokens": "the tokenizer makes nothing of it",
    "line_ends": "carriage returns made line feeds",
    "control_characters": "control characters dropped",
    "normalized": "documents brought into NFC",
}


class Totals:
    """Counts by source: ``read`` documents, ``kept`` ones with their ``bytes``, REASONS and CHANGES."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self.names = [PurePosixPath(plain(name).rstrip("/")).name or name for name in inputs]
        self.counts: list[Counter[str]] = [Counter() for _ in inputs]

    def add(self, batch: Batch, reasons: Sequence[str | None]) -> None:
        """Take in a batch and why some of its documents are dropped."""
        counts = self.counts[batch.source]
        counts.update(batch.counts)
        counts.update(reason for reason in reasons if reason)
        kept = [len(text) for text, reason in zip(batch.texts, reasons, strict=True) if not reason]
        counts.update(kept=len(kept), bytes=sum(kept))

    def sum(self) -> Counter[str]:
        """Over all sources."""
        return sum(self.counts, Counter())

    def record(self) -> list[dict[str, Any]]:
        """JSON values, one for each source."""
        return [{"name": name, **_described(counts)} for name, counts in zip(self.names, self.counts, strict=True)]


def _described(counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "read": counts["read"],
        "kept": counts["kept"],
        "bytes": counts["bytes"],
        "dropped": {reason: counts[reason] for reason in REASONS if counts[reason]},
        "changed": {change: counts[change] for change in CHANGES if counts[change]},
    }


def dropped_in_words(counts: Mapping[str, int]) -> str:
    """One line: how many documents were dropped, and why."""
    return ", ".join(f"{counts[reason]:,} {WORDS[reason]}" for reason in REASONS if counts[reason]) or "none"


def warnings_of(manifest: Mapping[str, Any]) -> list[str]:
    """What to know about the tokenizer, a line each."""
    tokenizer = manifest["tokenizer"]
    off = [f"{tokenizer['file']} asks for {', '.join(tokenizer['not_applied'])}: not applied, documents are encoded whole"]
    lossy = round_trip.in_words(manifest)
    return (off if tokenizer["not_applied"] else []) + ([lossy] if lossy else [])


def markdown(manifest: Mapping[str, Any]) -> str:
    """The page report.md."""
    total = manifest["documents"]
    lines = ["# What this folder holds", ""]
    lines += _table(("split", "documents", "tokens", "bytes of text", "bytes stored"), _split_rows(manifest))
    lines += ["## Documents in and out", ""]
    rows = [(s["name"], s["read"], s["kept"], s["read"] - s["kept"], s["bytes"]) for s in manifest["sources"]]
    if len(rows) > ROWS:
        rest = rows[ROWS:]
        rows = [*rows[:ROWS], (f"{len(rest):,} more", *(sum(row[i] for row in rest) for i in range(1, 5)))]
    rows.append(("all", total["read"], total["kept"], total["read"] - total["kept"], total["bytes"]))
    lines += _table(("source", "read", "kept", "dropped", "bytes kept"), rows)
    notes = [left_out_in_words(Counter(manifest["left_out"])), *manifest["notes"]]
    lines += [f"{note[0].upper()}{note[1:]}.\n" for note in notes if note]
    lines += ["## Why documents were dropped, and what cleaning changed", ""]
    reasons = {**total["dropped"], **total["changed"]}
    lines += _table(("reason", "count"), [(WORDS[name], count) for name, count in reasons.items()] or [("nothing", 0)])
    lines += ["## Whether the tokenizer gives the text back", ""]
    found = manifest["round_trip"]
    lines += [*(warnings_of(manifest) or [f"It does: {found['decoded']:,} of {found['documents']:,} documents were decoded."]), ""]
    lines += ["## Settings", ""]
    lines += _table(("setting", "value"), [(name, _value(value)) for name, value in manifest["settings"].items()])
    return "\n".join(lines)


def _split_rows(manifest: Mapping[str, Any]) -> list[tuple[object, ...]]:
    return [(name, s["documents"], s["tokens"], s["bytes"], s["stored_bytes"]) for name, s in manifest["splits"].items()]


def _value(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell).replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---", *("---:" if isinstance(cell, int) else "---" for cell in rows[0][1:])]
    return [*(f"| {' | '.join(line)} |" for line in (head, rule, *cells)), ""]
