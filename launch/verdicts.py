"""Which nodes are broken or slow, from what each measured; the standard library alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ENOUGH = 4  # nodes from which their median says what is normal


def bad_nodes(folder: Path, nodes: Sequence[str], limits: Mapping[str, Any]) -> dict[str, str]:
    """Nodes that must not be trained on, and why.

    Args:
        folder: of the files NODE.json.
        nodes: that were asked.
        limits: of :class:`~bitlm_dist.launch.cluster.Preflight`.
    """
    found: dict[str, dict[str, Any]] = {}
    for node in nodes:
        try:
            found[node] = json.loads((folder / f"{node}.json").read_text())
        except (OSError, ValueError):
            found[node] = {}
    bad = {node: why for node, measured in found.items() if (why := _broken(measured, limits))}
    good = {node: measured for node, measured in found.items() if node not in bad}
    for node, measured in good.items():
        if why := _slow(measured, list(good.values()), limits):
            bad[node] = why
    return bad


def _broken(measured: Mapping[str, Any], limits: Mapping[str, Any]) -> str:
    if not measured:
        return f"said nothing within {limits['seconds']:.0f} s"
    if measured["error"]:
        return str(measured["error"])
    if measured["disk_gb"] < limits["disk_gb"]:
        return f"{measured['disk_gb']:.1f} GB free for the run folder, expected {limits['disk_gb']}"
    return ""


def _slow(measured: Mapping[str, Any], every: Sequence[Mapping[str, Any]], limits: Mapping[str, Any]) -> str:
    clocks = [other["clock"] for other in every if other["clock"] is not None]
    if measured["clock"] is not None and abs(measured["clock"] - median(clocks)) > limits["clock_seconds"]:
        return f"its clock is {abs(measured['clock'] - median(clocks)):.1f} s away from the others'"
    for name, what, unit in (("gemm", "matrix products", "TFLOP/s"), ("bandwidth", "links", "GB/s")):
        values = [other[name] for other in every if other[name] is not None]
        if measured[name] is not None and len(values) >= ENOUGH and measured[name] < limits[name] * median(values):
            return f"{what} at {measured[name]:.3g} {unit}, the median node has {median(values):.3g}"
    return ""
