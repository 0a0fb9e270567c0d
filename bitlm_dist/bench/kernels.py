"""`bitlm bench attention` and `in-block`: the table, the plot and the file of what kernels/bench.py measures."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitlm_dist.bench.results import environment_of
from bitlm_dist.files import to_json, write_atomically
from bitlm_dist.kernels.bench import BLOCKS, DENSE, Shape, Side, bench_attention, bench_in_block, device_of
from bitlm_dist.planning.flops import peak_bandwidth, peak_flops

BENCHES = {"attention": (bench_attention, DENSE, "TFLOP/s"), "in-block": (bench_in_block, BLOCKS, "GB/s")}


@dataclass(frozen=True)
class KernelResults:
    """One shape: its sides, the side that the others are compared with, and the most work a second that the device can do."""

    kind: str
    shape: Shape
    sides: Mapping[str, Side]
    peak: float | None  # FLOP/s or byte/s; None: not known

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns (one a side) and rows (one a measure) for the terminal."""
        _, yardstick, unit = BENCHES[self.kind]
        sides = self.sides.values()
        base = self.sides[yardstick].total
        memory = ["not measured" if side.peak_bytes is None else f"{side.peak_bytes / 2**20:,.0f}" for side in sides]
        rows = [
            *_times("forward", [side.forward for side in sides]),
            *_times("backward", [side.backward for side in sides]),
            [f"{unit}, forward", *(self._rate(side.rates[0]) for side in sides)],
            [f"{unit}, backward", *(self._rate(side.rates[1]) for side in sides)],
            [f"speed / {yardstick}", *(f"{base / side.total:.2f}" for side in sides)],
            ["peak memory beyond inputs, MiB", *memory],
        ]
        return [f"{self.shape.length:,} tokens", *self.sides], rows

    def _rate(self, rate: float) -> str:
        text = f"{rate / (1e12 if self.kind == 'attention' else 1e9):.3g}"
        return text if self.peak is None else f"{text} ({100 * rate / self.peak:.0f} % of peak)"


def _times(name: str, sides: Sequence[Sequence[float]]) -> list[list[str]]:
    medians = [f"{1e3 * statistics.median(seconds):.3g}" for seconds in sides]
    return [
        [f"{name}, ms, median", *medians],
        ["lowest … highest", *(f"{1e3 * min(seconds):.3g} … {1e3 * max(seconds):.3g}" for seconds in sides)],
    ]


def bench_kernels(kind: str, shapes: Sequence[Shape], repeats: int, backends: Sequence[str]) -> list[KernelResults]:
    """Measure each shape in turn.

    Args:
        kind: ``attention`` or ``in-block``.
        shapes: to measure.
        repeats: at least 1.
        backends: of the kernels; none: all that this machine has and that take the shape.

    Raises:
        UserError: a back end does not exist, is not here, or does not take a shape.
    """
    measure = BENCHES[kind][0]
    return [KernelResults(kind, shape, measure(shape, repeats, backends), _peak(kind, shape)) for shape in shapes]


def _peak(kind: str, shape: Shape) -> float | None:
    if kind == "in-block":
        return peak_bandwidth(device_of())
    return None if shape.dtype == "float32" else peak_flops(device_of())


def results_json(many: Sequence[KernelResults]) -> str:
    """One JSON object; seconds of every repeat."""
    found: list[dict[str, Any]] = [asdict(results) for results in many]
    return to_json({"environment": environment_of(), "results": found})


def save(many: Sequence[KernelResults], file: Path) -> None:
    """Write the JSON, whole or not at all."""
    write_atomically(file, results_json(many) + "\n")


def plot(many: Sequence[KernelResults], file: Path) -> None:
    """Forward with backward time, and peak memory, over the length: a line for each side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    times, memory = figure.subplots(1, 2)
    lengths = [results.shape.length for results in many]
    for name in many[0].sides:
        sides = [results.sides[name] for results in many if name in results.sides]
        times.plot(lengths[: len(sides)], [1e3 * side.total for side in sides], marker="o", label=name)
        peaks = [side.peak_bytes for side in sides if side.peak_bytes is not None]
        memory.plot(lengths[: len(peaks)], [peak / 2**20 for peak in peaks], marker="o", label=name)
    for axes, label in ((times, "forward + backward, ms"), (memory, "peak memory beyond inputs, MiB")):
        axes.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
    times.legend(frameon=False)
    figure.savefig(file)
