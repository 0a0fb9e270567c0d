"""Helpers of tests that train whole runs."""

import json


def losses(folder):
    """The loss of every step in a run folder's metrics."""
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
