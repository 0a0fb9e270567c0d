"""Cases of training on fake GPUs and their recorded traces.

`python traces.py`, a part of `make traces`, rewrites the records. A record holds, for a step after
the first one: where the host waits for the GPU, collectives by group, and peak memory.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILE = HERE / "traces.json"
SMALL = [
    *("--model.backbone.attention", "triton"),  # independent of installed packages
    *(
        "--data.sequence_length",
        "32",
        "--training.global_batch_tokens",
        "256",
        "--model.backbone.num_layers",
        "2",
    ),
    *(
        "--model.backbone.hidden_size",
        "32",
        "--model.backbone.head_dim",
        "16",
        "--model.backbone.ffn_hidden_size",
        "48",
    ),
    *(
        "--head.num_layers",
        "2",
        "--head.hidden_size",
        "32",
        "--head.num_heads",
        "2",
    ),
]
MIXTURE = ["--head.bits_per_group", "3", "--head.num_mixture_components", "2"]
# The one wait of the training loop: for what the step before reports, while a step runs.
READ = "training/readback.py read: synchronize"
PIPELINE, CONTEXT = ["--parallel.pipeline", "2"], ["--parallel.context", "2"]
TENSOR = ["--parallel.tensor", "2", "--parallel.sequence", "true"]
LAYOUTS = {
    "one": (1, []),
    "DP2": (2, []),
    "TP2+SP": (2, TENSOR),
    "PP2": (2, PIPELINE),
    "PP2 VPP2": (
        2,
        [
            *PIPELINE,
            "--parallel.virtual_pipeline",
            "2",
            "--parallel.micro_batch_size",
            "2",
            "--model.backbone.num_layers",
            "4",
        ],
    ),
    "CP2": (2, CONTEXT),
    "TP2 without SP, microbatches": (2, [*TENSOR[:2], "--parallel.micro_batch_size", "2"]),
    "PP2 DP2": (4, PIPELINE),
    "TP2+SP PP2 CP2 DP2": (16, [*TENSOR, *PIPELINE, *CONTEXT]),
}
HEADS = {
    "replicated": ["--parallel.head.engine", "replicated"],
    **{f"ZeRO {stage}": ["--parallel.head.zero_stage", str(stage)] for stage in range(4)},
    **{
        f"FSDP2 {stage}": [
            "--parallel.head.engine",
            "fsdp2",
            "--parallel.head.zero_stage",
            str(stage),
        ]
        for stage in (2, 3)
    },
    "ZeRO 2 offloaded": ["--parallel.head.zero_stage", "2", "--parallel.head.offload", "optimizer"],
    "ZeRO 3 offloaded": ["--parallel.head.zero_stage", "3", "--parallel.head.offload", "all"],
}
OPTIMIZERS = {"Muon": [], "AdamW": ["--optimizer.matrix_optimizer", "adamw"]}
PRECISIONS = {"fp32": [], "bf16": ["--training.precision", "bf16"]}
MODELS = {
    "default": MIXTURE,
    "paper": ["--preset", "paper"],
    "softmax": [*MIXTURE, "--model.output", "softmax", "--model.block_size", "1"],
    "tied": [
        *MIXTURE,
        "--model.output",
        "softmax",
        "--model.block_size",
        "1",
        "--model.tie_embeddings",
        "true",
    ],
}
# layout, rank, head, optimizer, precision, model
QUICK_ROWS = [
    ("one", 0, "replicated", "Muon", "fp32", "default"),
    ("one", 0, "replicated", "AdamW", "bf16", "paper"),
    ("DP2", 1, "ZeRO 2", "Muon", "bf16", "default"),
    ("DP2", 0, "ZeRO 3", "AdamW", "fp32", "paper"),
    ("TP2+SP", 1, "FSDP2 3", "Muon", "fp32", "default"),
    ("PP2 VPP2", 1, "replicated", "AdamW", "bf16", "default"),
    ("CP2", 0, "replicated", "Muon", "bf16", "softmax"),
    ("TP2+SP PP2 CP2 DP2", 15, "ZeRO 2", "AdamW", "bf16", "default"),
]

# Together with the quick ones: every layout on its first and last rank, with each optimizer and
# precision; every head with each optimizer, each supported precision and each preset; the softmax
# with each parallel split.
SLOW_ROWS = [
    ("DP2", 0, "ZeRO 0", "AdamW", "fp32", "default"),
    ("DP2", 1, "ZeRO 0", "Muon", "fp32", "paper"),
    ("DP2", 0, "ZeRO 1", "Muon", "fp32", "paper"),
    ("TP2+SP", 0, "ZeRO 1", "AdamW", "fp32", "default"),
    ("CP2", 1, "ZeRO 2", "AdamW", "fp32", "paper"),
    ("TP2+SP", 1, "ZeRO 3", "Muon", "bf16", "default"),
    ("CP2", 0, "FSDP2 2", "AdamW", "bf16", "paper"),
    ("DP2", 1, "FSDP2 2", "Muon", "fp32", "default"),
    ("DP2", 0, "FSDP2 3", "AdamW", "bf16", "paper"),
    ("DP2", 1, "ZeRO 2 offloaded", "Muon", "fp32", "default"),
    ("PP2 DP2", 2, "ZeRO 2 offloaded", "AdamW", "bf16", "paper"),
    ("DP2", 0, "ZeRO 3 offloaded", "AdamW", "fp32", "default"),
    ("DP2", 1, "ZeRO 3 offloaded", "Muon", "bf16", "paper"),
    ("DP2", 0, "replicated", "AdamW", "fp32", "default"),
    ("PP2", 0, "replicated", "Muon", "bf16", "paper"),
    ("PP2", 1, "replicated", "AdamW", "fp32", "default"),
    ("PP2 VPP2", 0, "replicated", "Muon", "fp32", "paper"),
    ("PP2 DP2", 0, "ZeRO 3", "Muon", "fp32", "default"),
    ("PP2 DP2", 3, "ZeRO 3", "Muon", "bf16", "paper"),
    ("PP2 DP2", 3, "FSDP2 3", "AdamW", "fp32", "default"),
    ("TP2 without SP, microbatches", 1, "ZeRO 2", "Muon", "fp32", "default"),
    ("TP2+SP PP2 CP2 DP2", 0, "ZeRO 2", "AdamW", "bf16", "default"),
    ("TP2+SP PP2 CP2 DP2", 15, "FSDP2 2", "Muon", "fp32", "paper"),
    ("DP2", 1, "replicated", "AdamW", "fp32", "softmax"),
    ("TP2+SP", 0, "replicated", "Muon", "bf16", "tied"),
    ("TP2 without SP, microbatches", 0, "replicated", "AdamW", "fp32", "softmax"),
    ("PP2", 1, "replicated", "Muon", "fp32", "softmax"),
]

# the paper's shapes at cluster scale, two microbatches per step: config, GPUs, rank, layout
UNSPLIT = ["--parallel.tensor", "1", "--parallel.sequence", "false"]
LARGE = {
    "0.6B on 8 GPUs": ("bitlm-0.6b", 8, 0, []),
    "8B on 64 GPUs": (
        *("bitlm-8b", 64, 63),
        [*UNSPLIT, "--parallel.activation_checkpointing", "full"],
    ),
}
LARGE_SEQUENCE = 16384


def case_of(layout: str, rank: int, *rest: str) -> tuple[str, dict[str, Any]]:
    """Build a case.

    Returns:
        Its name, and the function and arguments for :mod:`fake_ranks`.
    """
    world, words = LAYOUTS[layout]
    head, optimizer, precision, model = rest
    words = [
        *SMALL,
        *words,
        *HEADS[head],
        *OPTIMIZERS[optimizer],
        *PRECISIONS[precision],
        *MODELS[model],
    ]
    name = ", ".join((layout, f"rank {rank}", *rest))
    return name, {"function": "steps", "arguments": [words, None, world, rank]}


QUICK, SLOW = (dict(case_of(*row) for row in rows) for rows in (QUICK_ROWS, SLOW_ROWS))
for name, (config, world, rank, words) in LARGE.items():
    tokens = [
        "--training.global_batch_tokens",
        str(2 * world * LARGE_SEQUENCE),
        "--parallel.micro_batch_size",
        "1",
    ]
    SLOW[name] = {
        "function": "steps",
        "arguments": [[*SMALL[:2], *words, *tokens], config, world, rank, 151_936],
    }
CASES = QUICK | SLOW


def run_cases(cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Run each case in its own process.

    Args:
        cases: by name; see :mod:`fake_ranks`.
        folder: an empty folder.

    Returns:
        Result of each case; for one that failed, the end of its output.
    """
    numbered = [{"name": str(number), **case} for number, case in enumerate(cases.values())]
    (folder / "cases.json").write_text(json.dumps(numbered))
    scripts = str(Path(sys.executable).parent)  # ninja is there
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"}
    command = [sys.executable, str(HERE / "fake_ranks.py"), str(folder / "cases.json"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    found: dict[str, Any] = {}
    for number, name in enumerate(cases):
        file = folder / f"{number}.pickle"
        found[name] = (
            pickle.loads(file.read_bytes())
            if file.is_file()
            else file.with_suffix(".log").read_text()[-3000:]
        )
    return found


def to_record(found: dict[str, Any]) -> dict[str, Any]:
    """Record of a case: its last step, without the one read of the step before."""
    step = max(phase for phase in found["peak"] if phase.startswith("step"))
    waits = found["waits"].get(step, {})
    return {
        "waits": {place: count for place, count in waits.items() if place != READ},
        "collectives": found["collectives"].get(step, {}),
        "peak": found["peak"][step],
    }


def load_traces() -> dict[str, Any]:
    """Load all records."""
    cases: dict[str, Any] = json.loads(FILE.read_text())
    return cases


def main(names: Collection[str] = ()) -> None:
    """Rewrite the records of some cases or of all, and print which ones changed."""
    with tempfile.TemporaryDirectory() as folder:
        ran = run_cases({name: CASES[name] for name in names or CASES}, Path(folder))
    if broken := [f"{name}:\n{found}" for name, found in ran.items() if isinstance(found, str)]:
        sys.exit("\n".join(broken))

    old = load_traces() if FILE.is_file() else {}
    new = {name: to_record(found) for name, found in ran.items()}
    for name, found in new.items():
        changed = "new" if name not in old else "CHANGED"
        print(f"{name}: {'as before' if old.get(name) == found else changed}")
    FILE.write_text(
        json.dumps(
            {name: ({**old, **new})[name] for name in CASES if name in {**old, **new}}, indent=1
        )
        + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
