"""Reading of the small files of a run, without torch: JSON files, and logs of one record per line.

A process may be killed while it writes, so whatever cannot be read counts as absent.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# the names of bitlm_dist.training.metrics, which is above this layer
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"

_TAIL_BYTES = 2**16  # about a hundred records of metrics.jsonl


def read_text(file: Path) -> str:
    """Contents of a file; empty if it cannot be read."""
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or holds none."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}

    return record if isinstance(record, dict) else {}


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """Read the records of a log, oldest first; none if the file does not exist."""
    if not file.is_file():
        return

    with file.open(errors="replace") as stream:
        yield from parse_records(stream)


def last_records(file: Path, count: int) -> list[dict[str, Any]]:
    """Read the last records of a log, oldest first.

    Only the end of the file is read: the metrics of a long run take hundreds of megabytes.

    Args:
        file: the log; need not exist.
        count: number of records, at most about a hundred.
    """
    if not file.is_file():
        return []

    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - _TAIL_BYTES))
        lines = stream.read().decode(errors="replace").splitlines()

    # the first line may begin in the middle of a record
    return list(parse_records(lines if size <= _TAIL_BYTES else lines[1:]))[-count:]


def parse_records(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Parse lines of a log that hold a JSON object; other lines are left out."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line may be half-written

        if isinstance(record, dict):
            yield record
