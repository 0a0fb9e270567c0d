"""Cases of training whose memory is traced on fake GPUs, and what the traces found.

`python memory_cases.py`, a part of `make traces`, rewrites the records, and prints them beside the
estimates of :mod:`bitlm_dist.planning.memory`. A record holds the bytes between steps and at the
peak of a step.
"""

import json
import sys
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from traces import HEADS, LAYOUTS, OPTIMIZERS, SMALL, run_cases

from bitlm_dist.config_loading import load_config
from bitlm_dist.parallel.layout import build_layout
from bitlm_dist.parallel.partition import assign_owners
from bitlm_dist.planning.memory import MemoryEstimate, estimate_training, with_margin
from bitlm_dist.planning.rank_parameters import rank_parameters
from bitlm_dist.training.optimizer import is_inner_matrix
from bitlm_dist.training.optimizers.muon import orthogonalize_flops

FILE = Path(__file__).parent / "memory.json"
VOCABULARY = 151_669  # Qwen-3's
GIB = 2**30

LENGTH = 8192
MODELS = {
    "default": ["--preset", "default"],
    "paper": ["--preset", "paper"],
    "softmax": ["--preset", "default", "--model.output", "softmax", "--model.block_size", "1"],
}
MODELS["tied"] = [*MODELS["softmax"], "--model.tie_embeddings", "true"]
FULL = ["--parallel.activation_checkpointing", "full"]
SELECTIVE = ["--parallel.activation_checkpointing", "selective"]
WITH_MLP = [*SELECTIVE, "--parallel.recompute_modules", "[layernorm, qk_layernorm, mlp]"]

# layout, rank, head, optimizer, precision, model, more options; the layers are as wide as those of
# bitlm-0.6b, so that rounding to the allocator's blocks does not matter
ROWS: list[tuple[str, int, str, str, str, str, list[str]]] = [
    ("one", 0, "replicated", "Muon", "fp32", "default", []),
    ("one", 0, "replicated", "AdamW", "bf16", "paper", ["--optimizer.ema", "0.99"]),
    ("DP2", 1, "ZeRO 2", "Muon", "bf16", "default", []),
    ("DP2", 0, "ZeRO 3", "AdamW", "fp32", "paper", []),
    ("DP2", 0, "ZeRO 0", "AdamW", "fp32", "default", ["--diffusion.num_noise_samples", "2"]),
    ("DP2", 1, "ZeRO 2 offloaded", "Muon", "fp32", "default", FULL),
    ("DP2", 1, "ZeRO 3 offloaded", "Muon", "bf16", "paper", ["--optimizer.sharded", "false"]),
    ("TP2+SP", 0, "ZeRO 1", "AdamW", "fp32", "default", []),
    ("TP2+SP", 1, "FSDP2 3", "Muon", "fp32", "default", FULL),
    ("CP2", 0, "FSDP2 2", "AdamW", "bf16", "paper", []),
    ("CP2", 0, "replicated", "Muon", "bf16", "softmax", []),
    ("TP2+SP", 0, "replicated", "Muon", "bf16", "tied", []),
    ("PP2", 0, "replicated", "Muon", "bf16", "paper", FULL),
    ("PP2", 0, "replicated", "AdamW", "bf16", "paper", SELECTIVE),
    ("PP2", 0, "replicated", "AdamW", "bf16", "paper", WITH_MLP),
    ("PP2 VPP2", 0, "replicated", "Muon", "fp32", "paper", []),
    ("PP2 VPP2", 1, "replicated", "AdamW", "bf16", "default", []),
    ("TP2 without SP, microbatches", 1, "ZeRO 2", "Muon", "fp32", "default", []),
    ("TP2+SP PP2 CP2 DP2", 15, "ZeRO 2", "AdamW", "bf16", "default", []),
]

# The shipped configs on a node, each with both recipes: the layout is the file's own. A layer costs
# the same as every other, so two depths give the peak of all.
PRESETS = [
    (f"bitlm-{size}", recipe)
    for size in ("0.6b", "1.7b", "4b", "8b")
    for recipe in ("default", "paper")
]
PRESET_GPUS = 8
DEPTHS = (1, 2)


def preset_words(recipe: str, num_layers: int) -> list[str]:
    """Options of a preset with fewer layers and two microbatches of a sequence per step."""
    return [*SMALL[:2], "--preset", recipe, "--model.backbone.num_layers", str(num_layers)]


def preset_name(config: str, recipe: str, num_layers: int) -> str:
    """Name of a preset's case."""
    return f"{config}, {recipe}, {num_layers} layers"


def _row_case(
    layout: str, rank: int, head: str, optimizer: str, precision: str, model: str, more: list[str]
) -> dict[str, Any]:
    world, words = LAYOUTS[layout]
    options = {
        "--model.backbone.num_layers": "2",
        "--parallel.micro_batch_size": "1",
        **dict(zip(words[::2], words[1::2], strict=True)),
    }
    axes = ("tensor", "pipeline", "context")
    ranks_per_replica = 1
    for axis in axes:
        ranks_per_replica *= int(options.get(f"--parallel.{axis}", 1))
    sequences = world // ranks_per_replica * int(options["--parallel.micro_batch_size"])
    num_microbatches = 4 if "--parallel.pipeline" in options else 2
    options["--data.sequence_length"] = str(LENGTH)
    options["--training.global_batch_tokens"] = str(LENGTH * sequences * num_microbatches)

    words = [word for item in options.items() for word in item]
    chosen = [
        *MODELS[model],
        *(["--optimizer.matrix_optimizer", "muon"] if optimizer == "Muon" else OPTIMIZERS["AdamW"]),
        *HEADS[head],
        *("--training.precision", precision),
    ]
    arguments = [[*SMALL[:2], *words, *chosen, *more], "bitlm-0.6b", world, rank, VOCABULARY, 1]
    return {"function": "steps", "arguments": arguments}


def _preset_case(config: str, recipe: str, num_layers: int) -> dict[str, Any]:
    words = preset_words(recipe, num_layers)
    parallel = load_config(Path(config), words).config.parallel
    tokens = 2 * build_layout(parallel, PRESET_GPUS, 0).data * 16384
    words += ["--training.global_batch_tokens", str(tokens)]
    return {"function": "steps", "arguments": [words, config, PRESET_GPUS, 0, VOCABULARY, 1]}


CASES = {", ".join(map(str, (*row[:-1], *row[-1][1::2]))): _row_case(*row) for row in ROWS}
CASES |= {
    preset_name(*preset, depth): _preset_case(*preset, depth)
    for preset in PRESETS
    for depth in DEPTHS
}


def estimate_of(case: str) -> MemoryEstimate:
    """The estimate for a case."""
    words, file, world, rank, vocabulary, _ = CASES[case]["arguments"]
    config = load_config(Path(file), words).config
    return estimate_training(config, build_layout(config.parallel, world, rank), vocabulary)


def to_record(found: dict[str, Any]) -> dict[str, float]:
    """Bytes that a trace found, TFLOP, and GB that the rank sends in collectives."""
    return {
        "state": found["static"]["build"],
        "peak": found["peak"]["step 0"],
        "TFLOP": round(found["flops"]["step 0"] / 1e12, 2),
        "GB": round(sum(sent[2] for sent in found["sent"]["step 0"]) / 1e9, 2),
    }


def load_records() -> dict[str, dict[str, float]]:
    """Load all records."""
    records: dict[str, dict[str, float]] = json.loads(FILE.read_text())
    return records


def at_full_depth(config: str, recipe: str) -> dict[str, float]:
    """Record of a preset with all its layers: its state, and what two depths tell of a step."""
    records = load_records()
    first, second = (records[preset_name(config, recipe, depth)] for depth in DEPTHS)
    loaded = load_config(Path(config), ["--preset", recipe]).config
    layout = build_layout(loaded.parallel, PRESET_GPUS, 0)
    state = estimate_training(loaded, layout, VOCABULARY).state_bytes

    def extrapolate(one: float, two: float) -> float:
        """Extend the line through both depths."""
        num_more = loaded.model.backbone.num_layers - DEPTHS[0]
        return one + num_more * (two - one) / (DEPTHS[1] - DEPTHS[0])

    # which tensors of an optimizer are this rank's is not linear in their number
    step = extrapolate(*(record["peak"] - record["state"] for record in (first, second)))
    shared = [_muon_tflop(config, recipe, depth) for depth in DEPTHS]
    tflop = extrapolate(*(r["TFLOP"] - own for r, own in zip((first, second), shared, strict=True)))
    tflop += _muon_tflop(config, recipe, loaded.model.backbone.num_layers)
    gigabytes = extrapolate(first["GB"], second["GB"])
    return {"state": state, "peak": state + step, "TFLOP": tflop, "GB": gigabytes}


def _muon_tflop(config: str, recipe: str, num_layers: int) -> float:
    """TFLOP of the backbone's matrices that rank 0 orthogonalizes, not linear in the layers."""
    loaded = load_config(Path(config), preset_words(recipe, num_layers)).config
    if loaded.optimizer.matrix_optimizer != "muon":
        return 0.0

    layout = build_layout(loaded.parallel, PRESET_GPUS, 0)
    unsplit = replace(layout, tensor=1, sequence=False)
    shapes = rank_parameters(loaded, unsplit, VOCABULARY).shapes
    costs = [
        orthogonalize_flops(shape)
        for name, shape in shapes.items()
        if name.startswith("backbone.") and is_inner_matrix(name, torch.empty(shape, device="meta"))
    ]
    owners = assign_owners(costs, layout.tensor * layout.num_optimizer_shards)
    return sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == 0) / 1e12


def preset_table() -> list[str]:
    """The table of docs/gpu.md: the shipped configs on a node, per rank."""
    lines = []
    for config, recipe in PRESETS:
        loaded = load_config(Path(config), ["--preset", recipe]).config
        layout = build_layout(loaded.parallel, PRESET_GPUS, 0)
        found = at_full_depth(config, recipe)
        sizes = (found["state"], found["peak"], with_margin(round(found["peak"])))
        cells = [
            f"`{config}`",
            recipe,
            f"TP {layout.tensor}, DP {layout.data}",
            *(f"{size / GIB:.1f}" for size in sizes),
            f"{found['TFLOP']:,.0f}",
            f"{found['GB']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(names: Collection[str] = ()) -> None:
    """Rewrite the records of some cases or of all, and print them beside the estimates."""
    with tempfile.TemporaryDirectory() as folder:
        ran = run_cases({name: CASES[name] for name in names or CASES}, Path(folder))
    if broken := [f"{name}:\n{found}" for name, found in ran.items() if isinstance(found, str)]:
        sys.exit("\n".join(broken))

    records = load_records() if FILE.is_file() else {}
    records |= {name: to_record(found) for name, found in ran.items()}
    for name in ran:
        found, estimate = records[name], estimate_of(name)
        phase = max(estimate.momentary, key=lambda key: estimate.momentary[key])
        sides = {
            "state": (found["state"], estimate.state_bytes),
            "peak": (found["peak"], estimate.peak_bytes),
        }
        texts = [
            f"{what} {traced / GIB:.2f} GiB, estimate {estimated / traced - 1:+.1%}"
            for what, (traced, estimated) in sides.items()
        ]
        print(f"{name}: {', '.join(texts)} ({phase})")
    ordered = {name: records[name] for name in CASES if name in records}
    FILE.write_text(json.dumps(ordered, indent=1) + "\n")
    print("\ndocs/gpu.md:", *preset_table(), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
