"""Table, plot and JSON of `bitlm bench attention` and `bitlm bench in-block`."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bitlm_dist.bench.results import machine_environment
from bitlm_dist.files import write_atomically
from bitlm_dist.formatting import plural
from bitlm_dist.kernels.bench import (
    BLOCKS,
    DENSE,
    AttentionShape,
    KernelTiming,
    bench_attention,
    bench_in_block,
    default_device,
)
from bitlm_dist.planning.flops import peak_bandwidth, peak_flops
from bitlm_dist.plots import new_figure, save_plot
from bitlm_dist.strict_json import to_json

BENCHES = {
    "attention": (bench_attention, DENSE, "TFLOP/s"),
    "in-block": (bench_in_block, BLOCKS, "GB/s"),
}


@dataclass(frozen=True)
class KernelResults:
    """Measurements of all sides for one shape.

    Attributes:
        kind: a key of ``BENCHES``, which names the side that the others are compared with.
        shape: the measured shape.
        sides: timing of each backend or baseline.
        peak: peak rate of the device, FLOP/s or byte/s; None if unknown.
    """

    kind: str
    shape: AttentionShape
    sides: Mapping[str, KernelTiming]
    peak: float | None

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Column heads (one per side) and rows (one per measure) for the terminal."""
        _, yardstick, unit = BENCHES[self.kind]
        sides = self.sides.values()
        base = self.sides[yardstick].total

        # not every system can measure peak memory
        memory = [
            "not measured" if side.peak_bytes is None else f"{side.peak_bytes / 2**20:,.0f}"
            for side in sides
        ]

        rows = [
            *_time_rows("forward", [side.forward for side in sides]),
            *_time_rows("backward", [side.backward for side in sides]),
            [f"{unit}, forward", *(self._format_rate(side.rates[0]) for side in sides)],
            [f"{unit}, backward", *(self._format_rate(side.rates[1]) for side in sides)],
            [f"speed / {yardstick}", *(f"{base / side.total:.2f}" for side in sides)],
            ["peak memory beyond inputs, MiB", *memory],
        ]

        return [f"{self.shape.length:,} tokens", *self.sides], rows

    def _format_rate(self, rate: float) -> str:
        text = f"{rate / (1e12 if self.kind == 'attention' else 1e9):.3g}"
        return text if self.peak is None else f"{text} ({100 * rate / self.peak:.0f} % of peak)"


def _time_rows(name: str, sides: Sequence[Sequence[float]]) -> list[list[str]]:
    medians = [f"{1e3 * statistics.median(seconds):.3g}" for seconds in sides]
    return [
        [f"{name}, ms, median", *medians],
        [
            "lowest … highest",
            *(f"{1e3 * min(seconds):.3g} … {1e3 * max(seconds):.3g}" for seconds in sides),
        ],
    ]


def bench_kernels(
    kind: str,
    shapes: Sequence[AttentionShape],
    repeats: int,
    backends: Sequence[str],
    report: Callable[[int], None] = lambda done: None,
) -> list[KernelResults]:
    """Measure each shape in turn.

    Args:
        kind: ``attention`` or ``in-block``.
        shapes: shapes to measure.
        repeats: at least 1.
        backends: kernel backends; empty: all that are available here and support the shape.
        report: called after every repeat with their number so far, of all shapes.

    Raises:
        UserError: a backend does not exist, is not available, or does not support a shape.
    """
    measure = BENCHES[kind][0]
    all_results = []
    for number, shape in enumerate(shapes):
        report_all = partial(_report_all, report, number * repeats)
        sides = measure(shape, repeats, backends, report_all)
        all_results.append(KernelResults(kind, shape, sides, _peak_rate(kind, shape)))

    return all_results


def _report_all(report: Callable[[int], None], num_before: int, done: int) -> None:
    report(num_before + done)


def settings_line(shape: AttentionShape, sizes: Mapping[str, int], repeats: int) -> str:
    """The settings and the machine in one line, to print below the tables."""
    environment = machine_environment()
    shown = ", ".join(f"{name} {value}" for name, value in sizes.items())
    threads = plural(environment["threads"], "thread")
    return (
        f"{shown}, {shape.dtype}, {plural(repeats, 'repeat')}; {environment['device']}, {threads}"
    )


def _peak_rate(kind: str, shape: AttentionShape) -> float | None:
    if kind == "in-block":
        return peak_bandwidth(default_device())
    return None if shape.dtype == "float32" else peak_flops(default_device())


def results_to_json(all_results: Sequence[KernelResults]) -> str:
    """Serialize all results, with the seconds of every repeat, as one JSON object."""
    records: list[dict[str, Any]] = [asdict(results) for results in all_results]
    return to_json({"environment": machine_environment(), "results": records})


def save_kernel_results(all_results: Sequence[KernelResults], file: Path) -> None:
    """Write the JSON atomically."""
    write_atomically(file, results_to_json(all_results) + "\n")


def plot_kernel_results(all_results: Sequence[KernelResults], file: Path) -> None:
    """Plot time of forward and backward, and peak memory, over the length: one line per side."""
    figure = new_figure(9, 3.8)
    times, memory = figure.subplots(1, 2)
    ordered = sorted(all_results, key=lambda results: results.shape.length)
    lengths = [results.shape.length for results in ordered]

    # a side that does not support every shape has fewer points
    for name in dict.fromkeys(name for results in ordered for name in results.sides):
        sides = {r.shape.length: r.sides[name] for r in ordered if name in r.sides}
        totals = [1e3 * side.total for side in sides.values()]
        times.plot(list(sides), totals, marker="o", label=name)

        peaks = {n: side.peak_bytes for n, side in sides.items() if side.peak_bytes is not None}
        mebibytes = [peak / 2**20 for peak in peaks.values()]
        memory.plot(list(peaks), mebibytes, marker="o", label=name)

    for axes, label in (
        (times, "forward + backward, ms"),
        (memory, "peak memory beyond inputs, MiB"),
    ):
        axes.set(xlabel="tokens", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()

    times.legend(frameon=False)
    save_plot(figure, file)
