"""Counts of documents in, documents out and reasons for the difference, and the page report.md.

The page holds names of files and numbers but no times and no folders, so that equal preparations
have equal reports.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from bitlm_dist.data_prep import round_trip
from bitlm_dist.data_prep.input_files import left_out_summary, without_query
from bitlm_dist.data_prep.reading import CLEANING_CHANGES, DROP_REASONS, DocumentBatch
from bitlm_dist.formatting import plural

MAX_SOURCE_ROWS = 30  # keeps report.md to one page; manifest.json has all sources
DESCRIPTIONS = {
    "not_utf8": "not UTF-8",
    "not_json": "not a JSON object",
    "no_text": "no text in the field",
    "empty": "empty",
    "too_short": "shorter than --min-chars",
    "too_long": "longer than --max-chars",
    "other_language": "in another language",
    "contaminated": "contains evaluation text",
    "duplicate": "copy of an earlier document",
    "near_duplicate": "near copy of an earlier document",
    "no_tokens": "encoded to no tokens",
    "line_ends": "carriage returns replaced by line feeds",
    "control_characters": "control characters removed",
    "normalized": "documents normalized to NFC",
}
PLURALS = {
    "contaminated": "contain evaluation text",
    "duplicate": "copies of earlier documents",
    "near_duplicate": "near copies of earlier documents",
}
# What brings documents back that were dropped for a reason.
REMEDIES = {
    "not_utf8": "convert the files to UTF-8, e.g. with iconv",
    "not_json": "give one JSON object per line",
    "no_text": "name the key or column of the text with --field",
    "too_short": "lower --min-chars",
    "too_long": "raise --max-chars (0: no limit), or cut .txt files with --document-separator",
    "other_language": "check --language and --language-probability",
    "contaminated": "check --decontaminate and --hit-ratio",
}


class SourceCounts:
    """Counts by source.

    The keys are ``read`` and ``kept`` documents, ``bytes`` of those kept, DROP_REASONS and
    CLEANING_CHANGES.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        # Without folders, on which the report must not depend.
        self.names = [
            PurePosixPath(without_query(name).rstrip("/")).name or name for name in inputs
        ]
        self.counts: list[Counter[str]] = [Counter() for _ in inputs]

    def add(self, batch: DocumentBatch, reasons: Sequence[str | None]) -> None:
        """Add a batch.

        Args:
            batch: Documents of one chunk.
            reasons: For each of them the reason to drop it as a duplicate, or None.
        """
        counts = self.counts[batch.source_index]
        counts.update(batch.counts)
        counts.update(reason for reason in reasons if reason)

        kept = [len(text) for text, reason in zip(batch.texts, reasons, strict=True) if not reason]
        counts.update(kept=len(kept), bytes=sum(kept))

    def sum(self) -> Counter[str]:
        """Sum the counts over all sources."""
        return sum(self.counts, Counter())

    def per_source(self) -> list[dict[str, Any]]:
        """JSON values, one per source."""
        return [
            {"name": name, **_source_summary(counts)}
            for name, counts in zip(self.names, self.counts, strict=True)
        ]


def _source_summary(counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "read": counts["read"],
        "kept": counts["kept"],
        "bytes": counts["bytes"],
        "dropped": {reason: counts[reason] for reason in DROP_REASONS if counts[reason]},
        "changed": {change: counts[change] for change in CLEANING_CHANGES if counts[change]},
    }


def drop_summary(counts: Mapping[str, int]) -> str:
    """Summarize in one line how many documents were dropped, and why."""
    return (
        ", ".join(
            plural(counts[reason], DESCRIPTIONS[reason], PLURALS.get(reason, DESCRIPTIONS[reason]))
            for reason in DROP_REASONS
            if counts[reason]
        )
        or "none"
    )


def drop_remedy(counts: Mapping[str, int]) -> str:
    """The remedy for the most frequent reason, after a colon; "" if there is none."""
    reason = max(DROP_REASONS, key=lambda reason: counts[reason])
    return f": {REMEDIES[reason]}" if counts[reason] and reason in REMEDIES else ""


def tokenizer_warnings(manifest: Mapping[str, Any]) -> list[str]:
    """Warnings about the tokenizer, one line each."""
    tokenizer = manifest["tokenizer"]
    off = [
        f"{tokenizer['file']} asks for {', '.join(tokenizer['not_applied'])}: not applied, "
        "documents are encoded whole"
    ]
    lossy = round_trip.lossy_warning(manifest)
    return (off if tokenizer["not_applied"] else []) + ([lossy] if lossy else [])


def render_markdown(manifest: Mapping[str, Any]) -> str:
    """Render the page report.md."""
    total = manifest["documents"]
    lines = ["# Contents of this folder", ""]
    lines += _table(
        ("split", "documents", "tokens", "bytes of text", "bytes stored"), _split_rows(manifest)
    )

    lines += ["## Documents in and out", ""]
    lines += _table(("source", "read", "kept", "dropped", "bytes kept"), _source_rows(manifest))
    notes = [left_out_summary(Counter(manifest["left_out"])), *manifest["notes"]]
    lines += [f"{note[0].upper()}{note[1:]}.\n" for note in notes if note]

    lines += ["## Dropped documents and changes by cleaning", ""]
    reasons = {**total["dropped"], **total["changed"]}
    lines += _table(
        ("reason", "count"),
        [(DESCRIPTIONS[name], count) for name, count in reasons.items()] or [("nothing", 0)],
    )

    lines += ["## Round trip of the tokenizer", ""]
    checks = manifest["round_trip"]
    lines += [
        *(
            tokenizer_warnings(manifest)
            or [
                "Every document is given back; decoded for this check: "
                f"{checks['decoded']:,} of {plural(checks['documents'], 'document')}."
            ]
        ),
        "",
    ]

    lines += ["## Settings", ""]
    lines += _table(
        ("setting", "value"),
        [(name, _setting_value(name, value)) for name, value in manifest["settings"].items()],
    )
    return "\n".join(lines)


def _source_rows(manifest: Mapping[str, Any]) -> Sequence[tuple[object, ...]]:
    """Rows of the first MAX_SOURCE_ROWS sources, of the others together, and of all."""
    rows = [
        (s["name"], s["read"], s["kept"], s["read"] - s["kept"], s["bytes"])
        for s in manifest["sources"]
    ]
    if len(rows) > MAX_SOURCE_ROWS:
        rest = rows[MAX_SOURCE_ROWS:]
        rows = [
            *rows[:MAX_SOURCE_ROWS],
            (f"{len(rest):,} more", *(sum(row[i] for row in rest) for i in range(1, 5))),
        ]

    total = manifest["documents"]
    rows.append(
        ("all", total["read"], total["kept"], total["read"] - total["kept"], total["bytes"])
    )
    return rows


def _split_rows(manifest: Mapping[str, Any]) -> list[tuple[object, ...]]:
    return [
        (name, s["documents"], s["tokens"], s["bytes"], s["stored_bytes"])
        for name, s in manifest["splits"].items()
    ]


def _setting_value(name: str, value: object) -> str:
    # The value itself, which identifies a folder, stays as earlier versions wrote it.
    if name == "inputs":
        return re.sub("^1 files", "1 file", str(value))
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table, numbers aligned right."""
    # An unescaped pipe would end the cell.
    cells = [
        [f"{cell:,}" if isinstance(cell, int) else str(cell).replace("|", "\\|") for cell in row]
        for row in rows
    ]

    rule = ["---", *("---:" if isinstance(cell, int) else "---" for cell in rows[0][1:])]
    return [*(f"| {' | '.join(line)} |" for line in (head, rule, *cells)), ""]
