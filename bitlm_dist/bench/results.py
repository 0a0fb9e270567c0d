"""Results of a bench: JSON to save and load, a table, a plot.

What measures is imported where it is used: saved results are shown without torch.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitlm_dist.config import Config
from bitlm_dist.errors import UserError, os_error_message
from bitlm_dist.files import write_atomically
from bitlm_dist.formatting import format_value, plural, ratio_or_none
from bitlm_dist.plots import new_figure, save_plot
from bitlm_dist.strict_json import to_json

if TYPE_CHECKING:
    from bitlm_dist.bench.interleaved import Timing
    from bitlm_dist.planning.flops import Flops

VERSION = 2


@dataclass(frozen=True)
class Results:
    """Results of one bench.

    Attributes:
        kind: ``train``, ``generate`` or ``data``.
        first: the side that the others are compared with.
        sides: rates, FLOPs and memory of each side.
        settings: of the bench and its model.
        environment: of the machine.
        version: of this format.
    """

    kind: str
    first: str
    sides: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    environment: dict[str, Any]
    version: int = VERSION

    @property
    def ratios(self) -> dict[str, float]:
        """Median tokens/s of the first side divided by that of each other side.

        The rates count all positions, also those whose token is not predicted.
        """
        reference_rate = self.sides[self.first]["tokens_per_second"]["median"]
        return {
            name: reference_rate / side["tokens_per_second"]["median"]
            for name, side in self.sides.items()
            if name != self.first
        }

    @property
    def predicted_ratios(self) -> dict[str, float]:
        """Ratios as in :attr:`ratios`, but of predicted tokens.

        Empty for the results of a version that did not count them.
        """
        rates = {name: side.get("predicted_tokens_per_second") for name, side in self.sides.items()}
        reference_rate = rates.pop(self.first)

        return {
            name: ratio
            for name, rate in rates.items()
            if (ratio := ratio_or_none(reference_rate, rate)) is not None
        }

    def to_json(self) -> str:
        """Serialize the results and both ratios as one JSON object."""
        ratios = {
            "ratio_tokens_per_second": self.ratios,
            "ratio_predicted_tokens_per_second": self.predicted_ratios,
        }
        return to_json({**asdict(self), **ratios})

    def save(self, file: Path) -> None:
        """Write the JSON atomically."""
        write_atomically(file, self.to_json() + "\n")


def read_results(file: Path) -> Results:
    """Read what :meth:`Results.save` wrote.

    Raises:
        UserError: the file is missing, or holds no results of this version.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"results cannot be read: {os_error_message(error)}") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise UserError(
            f"{file} holds no JSON: name a file that `bitlm bench … --out FILE` wrote"
        ) from None

    # the version first: another one may have other fields
    if not isinstance(record, dict) or "version" not in record:
        raise UserError(f"{file} holds no bench results: {_advice(record)}")
    if record["version"] != VERSION:
        raise UserError(
            f"{file} holds results of version {record['version']}, this program reads {VERSION}: "
            "run the bench again"
        )

    # JSON also holds the ratios, which are computed
    names = {field.name for field in fields(Results)}
    if not names <= record.keys():
        raise UserError(
            f"{file} lacks {', '.join(sorted(names - record.keys()))}: run the bench again"
        )

    results = Results(**{name: record[name] for name in names})
    try:
        results_table(results)
        settings_line(results)
        _title(results)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file} is damaged: run the bench again") from None
    return results


def _advice(record: Any) -> str:
    if isinstance(record, dict) and {"results", "environment"} <= record.keys():
        return (
            "it is of `bitlm bench attention` or `in-block`, whose results are printed and plotted "
            "when they are measured"
        )
    return "name a file that `bitlm bench … --out FILE` wrote"


def common_settings(config: Config, vocab_size: int, repeats: int) -> dict[str, Any]:
    """Settings that every bench records about its model and itself."""
    model = config.model
    return {
        "vocabulary": vocab_size,
        "width": model.backbone.hidden_size,
        "layers": model.backbone.num_layers,
        "block_size": model.block_size,
        "head_width": config.head.hidden_size,
        "precision": config.training.precision,
        "repeats": repeats,
    }


def machine_environment() -> dict[str, Any]:
    """Device, threads and versions of this machine, without the command line."""
    from bitlm_dist.training.run_folder import environment

    record = environment()

    # the settings already tell what was run
    del record["command"]
    return record


def summarize_timing(timing: "Timing", flops: "Flops", predicted_fraction: float) -> dict[str, Any]:
    """Build the entry of one side.

    Args:
        timing: measurements of the side.
        flops: FLOPs per token.
        predicted_fraction: fraction of the positions whose token is predicted.
    """
    from bitlm_dist.parallel import mesh
    from bitlm_dist.planning.flops import peak_flops

    # without a known peak there is no MFU
    peak = peak_flops(mesh.device())
    low, high = timing.spread

    return {
        "tokens_per_second": {
            "median": timing.median,
            "lowest": low,
            "highest": high,
            "all": timing.tokens_per_second,
        },
        "predicted_tokens_per_second": timing.median * predicted_fraction,
        "cpu_seconds_per_token": timing.cpu_seconds_per_token,
        "seconds_before": timing.prepare_seconds,
        "flops_per_token": {**asdict(flops), "total": flops.total},
        "flops_per_second": flops.total * timing.median,
        "mfu": None if peak is None else flops.total * timing.median / peak,
        "peak_bytes": timing.peak_bytes,
    }


def results_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column heads (one per side) and rows (one per measure) for the terminal."""
    sides = results.sides.values()
    ratios = results.ratios
    rates = [side["tokens_per_second"] for side in sides]
    prepare_ms = [f"{1e3 * side['seconds_before']:,.0f}" for side in sides]

    rows = [
        ["tokens/s, median", *(f"{rate['median']:,.1f}" for rate in rates)],
        [
            "lowest … highest",
            *(f"{rate['lowest']:,.1f} … {rate['highest']:,.1f}" for rate in rates),
        ],
        [
            f"{results.first} / this side",
            *(format_value(ratios.get(name), "{:.2f}") for name in results.sides),
        ],
        [
            "predicted tokens/s",
            *(format_value(side.get("predicted_tokens_per_second"), "{:,.1f}") for side in sides),
        ],
        [
            f"{results.first} / this side",
            *(format_value(results.predicted_ratios.get(name), "{:.2f}") for name in results.sides),
        ],
        ["CPU-ms per token", *(f"{1e3 * side['cpu_seconds_per_token']:.3f}" for side in sides)],
        # only generation has a prompt, and reading data computes nothing
        *([["ms to the first block", *prepare_ms]] if results.kind == "generate" else []),
        *(_flops_rows(results) if results.kind != "data" else []),
        ["peak memory, MiB", *(f"{side['peak_bytes'] / 2**20:,.0f}" for side in sides)],
    ]

    return ["", *results.sides], rows


def settings_line(results: Results) -> str:
    """The settings and the machine in one line, to print below the table."""
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items())
    threads = plural(results.environment["threads"], "thread")
    return f"{settings}; {results.environment['device']}, {threads}"


def _flops_rows(results: Results) -> list[list[str]]:
    sides = results.sides.values()
    mflops = {
        component: [f"{side['flops_per_token'][component] / 1e6:,.2f}" for side in sides]
        for component in ("backbone", "head", "output")
    }

    return [
        *([f"MFLOP per token, {component}", *numbers] for component, numbers in mflops.items()),
        ["GFLOP/s", *(f"{side['flops_per_second'] / 1e9:,.1f}" for side in sides)],
        [
            "MFU",
            *(
                "peak not known" if side["mfu"] is None else f"{100 * side['mfu']:.1f} %"
                for side in sides
            ),
        ],
    ]


def plot_results(all_results: Sequence[Results], file: Path) -> None:
    """Plot tokens/s as bars with their spread, one group of bars per result."""
    figure = new_figure(1.6 + 2.2 * len(all_results), 3.6)
    axes = figure.subplots()
    names = list(dict.fromkeys(name for results in all_results for name in results.sides))
    width = 0.8 / len(names)

    # results may lack sides, so each side has positions of its own
    for column, name in enumerate(names):
        positions = []
        rates = []
        for group, results in enumerate(all_results):
            if name in results.sides:
                positions.append(group + width * (column - (len(names) - 1) / 2))
                rates.append(results.sides[name]["tokens_per_second"])

        medians = [rate["median"] for rate in rates]
        errors = [
            [r["median"] - r["lowest"] for r in rates],
            [r["highest"] - r["median"] for r in rates],
        ]
        axes.bar(positions, medians, width, yerr=errors, capsize=3, label=name)

    axes.set_xticks(range(len(all_results)), [_title(results) for results in all_results])
    axes.set_ylabel("tokens/s")
    axes.legend(frameon=False)
    save_plot(figure, file)


def _title(results: Results) -> str:
    s = results.settings
    batch = f", batch {s['batch']}" if "batch" in s else ""
    layers = plural(s["layers"], "layer")
    return f"{results.kind}: V = {s['vocabulary']:,}\nd = {s['width']}, {layers}{batch}"
