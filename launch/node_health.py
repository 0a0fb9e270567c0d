"""Detection of broken and slow nodes from their preflight measurements; standard library only."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

MIN_NODES_FOR_MEDIAN = 4  # with fewer nodes their median does not tell what is normal


def bad_nodes(folder: Path, nodes: Sequence[str], thresholds: Mapping[str, Any]) -> dict[str, str]:
    """Find the nodes that must not be used for training.

    Args:
        folder: of the files NODE.json.
        nodes: names of all nodes of the job.
        thresholds: fields of :class:`~bitlm_dist.launch.cluster.Preflight`.

    Returns:
        The reason for each bad node.
    """
    measurements: dict[str, dict[str, Any]] = {}
    for node in nodes:
        try:
            measurements[node] = json.loads((folder / f"{node}.json").read_text())
        except (OSError, ValueError):
            measurements[node] = {}

    bad = {
        node: why
        for node, measured in measurements.items()
        if (why := _broken_reason(measured, thresholds))
    }

    # medians over the good nodes only: broken ones would distort them
    good = {node: measured for node, measured in measurements.items() if node not in bad}
    for node, measured in good.items():
        if why := _slow_reason(measured, list(good.values()), thresholds):
            bad[node] = why

    return bad


def _broken_reason(measured: Mapping[str, Any], thresholds: Mapping[str, Any]) -> str:
    """Reason why a node is broken by itself; empty if it is not."""
    if not measured:
        return f"no measurements within {thresholds['seconds']:.0f} s"
    if measured["error"]:
        return str(measured["error"])
    if measured["disk_gb"] < thresholds["disk_gb"]:
        return (
            f"{measured['disk_gb']:.1f} GB free for the run folder, "
            f"expected {thresholds['disk_gb']}"
        )

    return ""


def _slow_reason(
    measured: Mapping[str, Any],
    all_measured: Sequence[Mapping[str, Any]],
    thresholds: Mapping[str, Any],
) -> str:
    """Reason why a node deviates from the median of all nodes; empty if it does not."""
    clocks = [other["clock"] for other in all_measured if other["clock"] is not None]
    if (
        measured["clock"] is not None
        and abs(measured["clock"] - median(clocks)) > thresholds["clock_seconds"]
    ):
        return f"its clock is {abs(measured['clock'] - median(clocks)):.1f} s away from the others'"

    # hardware differs between clusters, so speeds are compared and not held to a constant
    for name, what, unit in (
        ("gemm", "matrix products", "TFLOP/s"),
        ("bandwidth", "links", "GB/s"),
    ):
        values = [other[name] for other in all_measured if other[name] is not None]
        if (
            measured[name] is not None
            and len(values) >= MIN_NODES_FOR_MEDIAN
            and measured[name] < thresholds[name] * median(values)
        ):
            return (
                f"{what} at {measured[name]:.3g} {unit}, the median node has {median(values):.3g}"
            )

    return ""
