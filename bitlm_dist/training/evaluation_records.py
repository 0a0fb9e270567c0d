"""Records of evaluations in a run folder: evaluations.jsonl. Imports no torch, for readers.

Training appends one per evaluation, `bitlm eval` one per call.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bitlm_dist.launch.records import read_jsonl
from bitlm_dist.strict_json import to_json

EVALUATIONS = "evaluations.jsonl"
BY_TRAINING = "train"  # the key "by" of a record: the command that evaluated
BY_EVAL = "eval"
# Costs of the run up to the model that was evaluated; a checkpoint's state has them, too.
PROGRESS_FIELDS = ("step", "tokens", "predicted_tokens", "text_bytes", "seconds", "cpu_seconds")


class ScoredText(NamedTuple):
    """The text of an evaluation: two runs are comparable if they were scored on the same one."""

    split: str
    tokens: int
    data: str  # fingerprint, which covers the choice of sequences if not all were scored


def evaluation_record(
    progress: Mapping[str, Any],
    report: Mapping[str, Any],
    by: str,
    split: str = "validation",
) -> dict[str, Any]:
    """Build the record of an evaluation.

    Args:
        progress: costs of the run up to this model, among them ``step``.
        report: the evaluator's report; its field ``scored`` goes beside it.
        by: the command that evaluated.
        split: the split that was scored.
    """
    return {
        **progress,
        "time": time.time(),
        "by": by,
        "split": split,
        **({"scored": report["scored"]} if "scored" in report else {}),
        "validation": {name: value for name, value in report.items() if name != "scored"},
    }


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """Read the records of held-out text in a run folder, ordered by step; empty without any."""
    held_out = [
        record
        for record in read_jsonl(run / EVALUATIONS)
        if isinstance(record.get("step"), int)
        and isinstance(record.get("validation"), dict)
        and record.get("split", "validation") == "validation"
    ]
    return sorted(held_out, key=lambda record: record["step"])


def scored_text(record: Mapping[str, Any]) -> ScoredText | None:
    """The text that a record is about; None if an older version wrote it."""
    scored = record.get("scored")
    if not scored:
        return None
    return ScoredText(record["split"], scored["tokens"], scored["data"])


def append_evaluation(run: Path, record: Mapping[str, Any]) -> None:
    """Append a record, also while the run trains.

    Raises:
        OSError: the file cannot be written.
    """
    # A single write at the end of the file does not mix with those of other processes.
    descriptor = os.open(run / EVALUATIONS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # After a line that a kill has cut, the record starts on a line of its own.
        size = os.fstat(descriptor).st_size
        is_cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        line = b"\n" * is_cut + to_json(record).encode() + b"\n"
        # A disk that gets full takes a part of the line, and refuses the rest.
        while line:
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)
