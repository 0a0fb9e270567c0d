"""What a bench found: JSON that can be kept and read again, a table, a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bitlm_dist.bench.contest import Timing
from bitlm_dist.config import Config
from bitlm_dist.errors import UserError
from bitlm_dist.evaluation.values import ratio_of, shown
from bitlm_dist.files import to_json, write_atomically
from bitlm_dist.parallel import mesh
from bitlm_dist.planning.flops import Flops, peak_flops
from bitlm_dist.training.run_folder import environment

VERSION = 2


@dataclass(frozen=True)
class Results:
    """One bench: its settings, and for each side rates, FLOPs and memory."""

    kind: str
    first: str  # the side that the others are compared with
    sides: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    environment: dict[str, Any]
    version: int = VERSION

    @property
    def ratios(self) -> dict[str, float]:
        """Median tokens/s, which count all positions, of the first side over each other side's."""
        own = self.sides[self.first]["tokens_per_second"]["median"]
        return {name: own / side["tokens_per_second"]["median"] for name, side in self.sides.items() if name != self.first}

    @property
    def predicted_ratios(self) -> dict[str, float]:
        """As :attr:`ratios`, of predicted tokens; empty for results of a version that did not count them."""
        rates = {name: side.get("predicted_tokens_per_second") for name, side in self.sides.items()}
        own = rates.pop(self.first)
        return {name: ratio for name, rate in rates.items() if (ratio := ratio_of(own, rate)) is not None}

    def to_json(self) -> str:
        """One JSON object, with ``ratio_tokens_per_second`` and ``ratio_predicted_tokens_per_second`` over each other side."""
        ratios = {"ratio_tokens_per_second": self.ratios, "ratio_predicted_tokens_per_second": self.predicted_ratios}
        return to_json({**asdict(self), **ratios})

    def save(self, file: Path) -> None:
        """Write the JSON, whole or not at all."""
        write_atomically(file, self.to_json() + "\n")


def read_results(file: Path) -> Results:
    """Read what :meth:`Results.save` wrote.

    Raises:
        UserError: no such file, no results, or results of another version.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise UserError(f"{file} holds no JSON: name a file that `bitlm bench … --out FILE` wrote") from None
    if not isinstance(found, dict) or "version" not in found:
        raise UserError(f"{file} holds no bench results: name a file that `bitlm bench … --out FILE` wrote")
    if found["version"] != VERSION:
        raise UserError(f"{file} holds results of version {found['version']}, this program reads {VERSION}: run the bench again")
    names = {field.name for field in fields(Results)}
    if not names <= found.keys():
        raise UserError(f"{file} lacks {', '.join(sorted(names - found.keys()))}: run the bench again")
    return Results(**{name: found[name] for name in names})


def settings_of(config: Config, vocabulary: int, repeats: int) -> dict[str, Any]:
    """What every bench records of its model and itself."""
    model = config.model
    return {
        "vocabulary": vocabulary,
        "width": model.backbone.width,
        "layers": model.backbone.layers,
        "block_size": model.block_size,
        "head_width": config.head.width,
        "precision": config.training.precision,
        "repeats": repeats,
    }


def environment_of() -> dict[str, Any]:
    """Device, threads and versions of this machine, without the command line."""
    found = environment()
    del found["command"]
    return found


def describe(timing: Timing, flops: Flops, predicted_share: float) -> dict[str, Any]:
    """One side of the results; ``predicted_share`` of its positions hold a token that is predicted."""
    peak = peak_flops(mesh.device())
    low, high = timing.spread
    return {
        "tokens_per_second": {"median": timing.median, "lowest": low, "highest": high, "all": timing.rates},
        "predicted_tokens_per_second": timing.median * predicted_share,
        "cpu_seconds_per_token": timing.cpu_seconds_per_token,
        "seconds_before": timing.seconds_before,
        "flops_per_token": {**asdict(flops), "total": flops.total},
        "flops_per_second": flops.total * timing.median,
        "mfu": None if peak is None else flops.total * timing.median / peak,
        "peak_bytes": timing.peak_bytes,
    }


def table_of(results: Results) -> tuple[list[str], list[list[str]]]:
    """Columns (one a side) and rows (one a measure) for the terminal."""
    sides, ratios = results.sides.values(), results.ratios
    rates = [side["tokens_per_second"] for side in sides]
    before = [f"{1e3 * side['seconds_before']:,.0f}" for side in sides]
    rows = [
        ["tokens/s, median", *(f"{rate['median']:,.1f}" for rate in rates)],
        ["lowest … highest", *(f"{rate['lowest']:,.1f} … {rate['highest']:,.1f}" for rate in rates)],
        [f"{results.first} / this side", *(f"{ratios[name]:.2f}" if name in ratios else "" for name in results.sides)],
        ["predicted tokens/s", *(shown(side.get("predicted_tokens_per_second"), "{:,.1f}") for side in sides)],
        [f"{results.first} / this side", *(shown(results.predicted_ratios.get(name), "{:.2f}") for name in results.sides)],
        ["CPU-ms per token", *(f"{1e3 * side['cpu_seconds_per_token']:.3f}" for side in sides)],
        *([["ms to the first block", *before]] if results.kind == "generate" else []),
        *(_flops_rows(results) if results.kind != "data" else []),
        ["peak memory, MiB", *(f"{side['peak_bytes'] / 2**20:,.0f}" for side in sides)],
    ]
    return ["", *results.sides], rows


def _flops_rows(results: Results) -> list[list[str]]:
    sides = results.sides.values()
    mega = {part: [f"{side['flops_per_token'][part] / 1e6:,.2f}" for side in sides] for part in ("backbone", "head", "output")}
    return [
        *([f"MFLOP a token, {part}", *numbers] for part, numbers in mega.items()),
        ["GFLOP/s", *(f"{side['flops_per_second'] / 1e9:,.1f}" for side in sides)],
        ["MFU", *("peak not known" if side["mfu"] is None else f"{100 * side['mfu']:.1f} %" for side in sides)],
    ]


def plot(many: Sequence[Results], file: Path) -> None:
    """Bars of tokens/s with their spread, one group for each result."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 2.2 * len(many), 3.6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for results in many for name in results.sides))
    width = 0.8 / len(names)
    for column, name in enumerate(names):
        places, rates = [], []
        for group, results in enumerate(many):
            if name in results.sides:
                places.append(group + width * (column - (len(names) - 1) / 2))
                rates.append(results.sides[name]["tokens_per_second"])
        medians = [rate["median"] for rate in rates]
        errors = [[r["median"] - r["lowest"] for r in rates], [r["highest"] - r["median"] for r in rates]]
        axes.bar(places, medians, width, yerr=errors, capsize=3, label=name)
    axes.set_xticks(range(len(many)), [_title(results) for results in many])
    axes.set_ylabel("tokens/s")
    axes.legend(frameon=False)
    figure.savefig(file)


def _title(results: Results) -> str:
    s = results.settings
    batch = f", batch {s['batch']}" if "batch" in s else ""
    return f"{results.kind}: V = {s['vocabulary']:,}\nd = {s['width']}, {s['layers']} layers{batch}"
